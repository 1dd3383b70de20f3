"""``server.publish``: put a finished run's adapters where others read them.

    DIR, file:///DIR, memory://..., s3://BUCKET/PATH, any URL that fsspec has a file system for
        URL/RUN/round-000008/adapters/..., audit.jsonl, and then URL/latest.json, which names them
    hf://USER/REPO[/PATH]
        the same files in one commit of a repository of Hugging Face's hub

``latest.json`` is written last, so that whoever follows it reads a whole folder: by a rename on a
local disk, by one object's replacement in a store. Credentials come from where the library looks
for them (environment, its own files), never from the URL.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from flexlora.config.paths import expanded
from flexlora.errors import UserError, one_line
from flexlora.runs.audit import AUDIT_FILE, PUBLISHED, file_digests
from flexlora.runs.folder import RunFolder
from flexlora.wire.files import write_atomically

__all__ = ["check_publish", "publish"]

LOG = logging.getLogger(__name__)
LATEST = "latest.json"
HUB, LOCAL = "hf", ("", "file", "local")
# What to install where fsspec knows a store and the package for it is missing.
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
_REPOSITORY = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:/(.+?))?/?")


def check_publish(url: str) -> None:
    """Refuse a place that cannot be one; opens no connection.

    Raises:
        UserError: an unknown protocol, one whose package is not installed, credentials in the URL,
            a hub address that names no repository.
    """
    if not url:
        return
    parts = urlsplit(url)
    if parts.scheme == HUB and not _REPOSITORY.fullmatch(url):
        raise UserError(
            f"server.publish is '{url}', expected hf://USER/REPO or hf://USER/REPO/PATH."
        )
    if "@" in parts.netloc:
        raise UserError(
            "server.publish has a name or a password in its URL, which every node would be sent; "
            "give them where the store's library looks for them, such as its environment variables."
        )
    protocol = parts.scheme
    if protocol in (HUB, *LOCAL):
        return
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        package = PACKAGES.get(protocol, f"fsspec's package for {protocol}")
        raise UserError(
            f"server.publish is '{url}', for which {package} is not installed here; `pip install "
            f"{package}` beside FlexLoRA, or give a folder."
        ) from None
    except ValueError:
        raise UserError(
            f"server.publish is '{url}', and '{protocol}' is no protocol that fsspec knows; give a "
            "folder, s3://BUCKET/PATH or hf://USER/REPO."
        ) from None


def publish(run: RunFolder, url: str, server_round: int) -> str:
    """Upload the adapters after ``server_round``; returns where they are, empty where it failed.

    A failure is logged and ends no run: the adapters are in the run folder all the same.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="flexlora-publish-") as place:
            where = _upload(_staged(run, Path(place), server_round), url)
        run.audit.append(PUBLISHED, round=server_round, to=where)
    except Exception as error:  # whatever a store's library raises
        LOG.warning(
            "the adapters of round %d could not be published to '%s', and stay in '%s': %s",
            server_round,
            url,
            run.path / "adapters",
            one_line(error),
        )
        return ""
    LOG.info("the adapters of round %d are published at %s", server_round, where)
    return where


def _staged(run: RunFolder, place: Path, server_round: int) -> Path:
    """A copy of what is published, as it will lie there."""
    folder = place / run.path.resolve().name / f"round-{server_round:06d}"
    shutil.copytree(run.path / "adapters", folder / "adapters")
    shutil.copyfile(run.path / AUDIT_FILE, folder / AUDIT_FILE)
    path = str(folder.relative_to(place))
    latest = {"path": path, "round": server_round, "files": file_digests(folder)}
    (place / LATEST).write_text(json.dumps(latest, indent=1, sort_keys=True) + "\n")
    return place


def _upload(place: Path, url: str) -> str:
    latest = (place / LATEST).read_bytes()
    path = json.loads(latest)["path"]
    if urlsplit(url).scheme == HUB:
        _commit(place, url, path)
        return f"{url.rstrip('/')}/{path}"
    protocol = urlsplit(url).scheme
    filesystem, root = fsspec.core.url_to_fs(url if protocol else expanded(url))
    root = root.rstrip("/")
    for file in sorted(p for p in (place / path).rglob("*") if p.is_file()):
        target = f"{root}/{file.relative_to(place).as_posix()}"
        filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        filesystem.put_file(str(file), target)
    if protocol in LOCAL:
        write_atomically(Path(root) / LATEST, latest)
    else:
        filesystem.pipe_file(f"{root}/{LATEST}", latest)
    return f"{url.rstrip('/')}/{path}"


def _commit(place: Path, url: str, path: str) -> None:
    """One commit with everything: a reader of the repository sees all of it or nothing."""
    from huggingface_hub import HfApi

    found = _REPOSITORY.fullmatch(url)
    assert found is not None
    HfApi().upload_folder(
        repo_id=found[1],
        folder_path=place,
        path_in_repo=found[2] or ".",
        commit_message=f"FlexLoRA: {path}",
    )
