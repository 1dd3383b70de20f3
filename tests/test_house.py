"""The rooms of docs/architecture.md, read from the syntax trees: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "flexlora": "flexlora",
    "clients": "flexlora.clients",
    "server": "flexlora.server",
    "simulations": "flexlora.simulations",
}
# The rooms of flexlora/ from the ground up: a room imports from itself and from those before it.
# What lies at the root (`ROOT_FILES`) is the ground. `algebra` knows matrices, not LoRA.
ROOMS = (
    *("root", "lora", "algebra", "aggregation", "data", "config", "wire", "training"),
    *("evaluation", "privacy", "planning", "runs", "report", "serving", "deploy", "commands"),
)
NOT_EVEN_BELOW = {("algebra", "lora")}
ROOT_FILES = {"__init__", "errors", "printable", "seeds", "units"}


def modules():
    """``{dotted name: (path, tree)}`` of all product code, by the names it is installed under."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = (path, ast.parse(path.read_text(encoding="utf-8")))
    return found


MODULES = modules()


def imports(name, tree, *, top_only=False):
    """Absolute dotted names that a module imports, those inside functions included."""
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = MODULES.get(name, (Path("x.py"),))[0].name == "__init__.py"
                up = name.split(".")[: -(node.level - is_package) or None]
                base = ".".join([*up, base] if base else up)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def room(name):
    """``flexlora.training.slots`` -> ``training``; ``ROOT_FILES`` are ``root``."""
    part = name.split(".")[1]
    return "root" if part in ROOT_FILES else part


def package(name):
    """``clients``, ``server``, ``simulations`` or ``flexlora``."""
    part = name.split(".")[1] if name.count(".") else ""
    return part if part in FOLDERS else "flexlora"


def flwr_imports(name, tree):
    return [used for used in imports(name, tree) if used.split(".")[0] == "flwr"]


def wrong_imports(name, tree):
    """What ``name`` imports and may not."""
    wrong, eager = [], set(imports(name, tree, top_only=True))
    for used in imports(name, tree):
        if used.split(".")[0] != "flexlora" or used == "flexlora" or name == "flexlora":
            continue
        ours, theirs = package(name), package(used)
        if ours != theirs:
            downwards = theirs == "flexlora" or (ours == "simulations" and theirs != "flexlora")
            lazily_up = name.startswith("flexlora.commands.") and used not in eager
            if not (downwards or lazily_up):
                wrong.append(used)
        elif ours == "flexlora":
            pair = room(name), room(used)
            if ROOMS.index(pair[0]) < ROOMS.index(pair[1]) or pair in NOT_EVEN_BELOW:
                wrong.append(used)
    return wrong


def forbidden_calls(tree):
    """pickle in any form: the modules, ``torch.load`` and ``allow_pickle=True``."""
    picklers = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in picklers]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            names = {alias.name for alias in node.names}
            if module in picklers or (module == "torch" and names & {"load", "save"}):
                found.append(node.module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword):
            safe = {"allow_pickle": "False", "weights_only": "True"}.get(node.arg)
            if safe is not None and ast.unparse(node.value) != safe:
                found.append(node.arg)
    return found


IN_FLEXLORA = [name for name in MODULES if package(name) == "flexlora"]


def test_the_walk_sees_the_house():
    assert {"flexlora", "flexlora.aggregation.flexlora", "flexlora.clients"} <= set(MODULES)
    assert len(IN_FLEXLORA) > 20
    used = set(imports("flexlora.training.local", MODULES["flexlora.training.local"][1]))
    assert {"flexlora.training.slots", "flexlora.data.collation", "torch"} <= used


@pytest.mark.parametrize("name", IN_FLEXLORA)
def test_flexlora_knows_no_flower(name):
    assert flwr_imports(name, MODULES[name][1]) == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    assert wrong_imports(name, MODULES[name][1]) == []


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_pickled(name):
    assert forbidden_calls(MODULES[name][1]) == []


@pytest.mark.parametrize(
    ("name", "source", "check"),
    [
        ("flexlora.x", "def f():\n    from flwr.common import Array", flwr_imports),
        ("flexlora.data.x", "import flwr as f", flwr_imports),
        ("flexlora.clients.x", "from flexlora.server.strategy import S", wrong_imports),
        ("flexlora.server.x", "def f():\n    import flexlora.clients.app", wrong_imports),
        ("flexlora.clients.x", "from flexlora import server", wrong_imports),
        ("flexlora.server.x", "from flexlora.simulations import grid", wrong_imports),
        (
            "flexlora.algebra.linalg",
            "from flexlora.training.layers import LoRALinear",
            wrong_imports,
        ),
        (
            "flexlora.algebra.decompose",
            "from flexlora.aggregation.engine.state import G",
            wrong_imports,
        ),
        ("flexlora.aggregation.x", "from flexlora.training.local import train", wrong_imports),
        ("flexlora.runs.folder", "from flexlora.server import app", wrong_imports),
        ("flexlora.commands.cli", "from flexlora.simulations import engine", wrong_imports),
        ("flexlora.x", "import pickle", lambda name, tree: forbidden_calls(tree)),
        ("flexlora.x", "import torch\ntorch.load('x')", lambda name, tree: forbidden_calls(tree)),
        ("flexlora.x", "np.load(f, allow_pickle=True)", lambda name, tree: forbidden_calls(tree)),
    ],
)
def test_each_rule_sees_its_own_breach(monkeypatch, name, source, check):
    """The rules above would pass on an empty tree; here is what they must catch."""
    for known in ("flexlora.server", "flexlora.simulations"):
        monkeypatch.setitem(MODULES, known, (Path("__init__.py"), ast.parse("")))
    assert check(name, ast.parse(source))


def test_cli_may_reach_up_lazily():
    source = "def f():\n    from flexlora.simulations import engine"
    assert wrong_imports("flexlora.commands.cli", ast.parse(source)) == []


def test_nothing_else_lies_at_the_root():
    assert {path.stem for path in (ROOT / "flexlora").glob("*.py")} == ROOT_FILES
    rooms = {path.parent.name for path in (ROOT / "flexlora").glob("*/__init__.py")}
    assert rooms - set(FOLDERS) == set(ROOMS) - {"root"}


@pytest.mark.parametrize("folder", ["clients", "server", "simulations"])
def test_python_and_every_tool_see_the_folder_where_it_is_imported(folder):
    """``flexlora/clients`` is a link to ``clients/``: no import hook, nothing to configure."""
    link = ROOT / "flexlora" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder


def test_no_file_is_longer_than_400_lines():
    files = [path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in files}
    assert len(lengths) > 40
    assert {name: count for name, count in lengths.items() if count > 400} == {}


def loaded_by(statement):
    """Which of the heavy packages a fresh interpreter has loaded after ``statement``."""
    code = (
        f"{statement}\nimport sys\n"
        "heavy = ('torch', 'flwr', 'transformers', 'numpy', 'ray', 'bitsandbytes')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(run.stdout)


def test_import_flexlora_loads_neither_torch_nor_flower():
    assert loaded_by("import flexlora") == []
    assert loaded_by("import flexlora.config.resolve, flexlora.errors, flexlora.seeds") == []


def test_names_of_the_package_are_there_on_first_use():
    loaded = loaded_by("import flexlora\nassert flexlora.LoRAFactors and flexlora.UserError")
    assert "torch" in loaded and "flwr" not in loaded and "transformers" not in loaded


def test_every_public_name_resolves():
    import flexlora

    for name in flexlora.__all__:
        assert getattr(flexlora, name) is not None
    assert set(flexlora.__all__) == set(dir(flexlora))
    with pytest.raises(AttributeError, match="no attribute 'Adaptor'"):
        flexlora.Adaptor  # noqa: B018
