"""Linears that text does not reach, that mix rows, or that PEFT loses are left out or refused."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import flexlora.training.trial_pass as trial
from family_checks import ROWS, adapter, build, examined
from flexlora.data.collation import collate
from flexlora.errors import UserError
from flexlora.evaluation.generation import generate_answers
from flexlora.evaluation.padding import takes_padding
from flexlora.planning.architectures import shape_from_config
from flexlora.server.members.roster import Member, Roster
from flexlora.server.observing.observer import LogObserver
from flexlora.training.layers import LoRALinear, PassShape
from flexlora.training.local import answer_losses
from flexlora.training.slots import SlotModel
from flexlora.training.targets import PLAIN, choose_targets, find_targets, is_plain
from flexlora.wire.jobs import Capability


def gemma3_with_a_tower():
    from transformers import Gemma3ForConditionalGeneration

    from family_configs import tiny_family

    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(tiny_family("gemma3"))
    return model.requires_grad_(False).eval()


def leaves(names):
    return {name.rpartition(".")[2] for name in names}


# The rows of a pass.


@pytest.mark.parametrize(
    ("shape", "rows", "width", "slots"),
    [((6, 5, 4), 6, 5, 2), ((30, 4), 6, 5, 2), ((6, 3, 7, 4), 6, 5, 3), ((6, 1, 4), 6, 1, 6)],
)
def test_inputs_in_the_order_of_the_rows_pass(shape, rows, width, slots):
    PassShape(rows=rows, width=width).check("q", torch.zeros(shape), slots)


@pytest.mark.parametrize(
    ("shape", "rows", "width", "slots"),
    [
        ((8, 4), 6, 5, 2),  # answer tokens alone, a number that both slots share
        ((5, 6, 4), 6, 5, 2),  # time first
        ((2, 4), 6, 5, 2),  # tokens of one expert
        ((6, 5, 4), 6, 5, 4),  # rows that four slots do not share
    ],
)
def test_other_inputs_are_refused_by_the_name_of_the_module(shape, rows, width, slots):
    with pytest.raises(
        ValueError, match=rf"'a\.q': its input has shape \({shape[0]}, .* {slots} s"
    ):
        PassShape(rows=rows, width=width).check("a.q", torch.zeros(shape), slots)


def test_a_layer_of_a_model_refuses_a_choice_of_tokens():
    model = build("llama")
    slots = SlotModel(model, "q_proj,down_proj")
    slots.load([adapter(slots.shapes, 2, 1), adapter(slots.shapes, 4, 2)])
    layer = model.model.layers[0].mlp.down_proj
    plain = LoRALinear.forward

    def chosen(module, x, *args):  # as behind logits_to_keep: 8 of the tokens, an even number
        return plain(module, x.reshape(-1, x.shape[-1])[:8] if module is layer else x, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"layers\.0\.mlp"):
        patch.setattr(LoRALinear, "forward", chosen)
        answer_losses(slots, collate(ROWS, pad_token_id=0))


class TimeFirst(nn.Module):
    """A decoder that runs ``[T, rows, d]`` inside, or whatever ``order`` makes of the rows."""

    def __init__(self, order):
        super().__init__()
        self.config = SimpleNamespace(model_type="own", to_dict=dict, vocab_size=40)
        self.embed, self.order = nn.Embedding(40, 8), order
        self.good, self.bad, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 40)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False, logits_to_keep=None):
        x = self.good(self.embed(input_ids)).cumsum(1)
        return SimpleNamespace(logits=self.head(self.order(self, x)))


ORDERS = {
    "time first": lambda m, x: m.bad(x.transpose(0, 1)).transpose(0, 1),
    "flat, time first": lambda m, x: (
        m.bad(x.transpose(0, 1).reshape(-1, 8)).reshape(5, 3, 8).transpose(0, 1)
    ),
    "rows turned round": lambda m, x: m.bad(x.flip(0)).flip(0),
    "sorted tokens": lambda m, x: x + m.bad(x[:, :2].reshape(-1, 8)).sum(0),
}


@pytest.mark.parametrize("order", ["time first", "flat, time first", "rows turned round"])
def test_linears_that_see_the_rows_in_another_order_are_left_out(order):
    torch.manual_seed(0)
    chosen = choose_targets(TimeFirst(ORDERS[order]), "all-linear")
    assert list(chosen.shapes) == ["good"]
    assert chosen.left_out == {"bad": "their inputs are not in the order of the rows"}


def test_time_first_is_found_whatever_the_sizes_of_the_batch():
    """A square batch hides the order of the axes from a check of shapes; the pass is not square."""
    assert (
        len({trial.ROWS, trial.TOKENS, trial.ROWS * trial.TOKENS, sum(map(sum, trial.KEEP))}) == 4
    )


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (lambda m, x: x + x.mean(0, keepdim=True), "rows of a batch affect each other"),
        (lambda m, x: x + x.mean(1, keepdim=True), "sees the tokens after it"),
        (lambda m, x: x[:, :, :3] @ m.bad.weight, "a pass of text alone fails"),
    ],
)
def test_models_whose_rows_or_tokens_leak_are_refused(order, message):
    with pytest.raises(UserError, match=rf"'own' cannot be trained: .*{message}"):
        find_targets(TimeFirst(order), "all-linear")


@pytest.mark.parametrize("name", ["bert#encoder", "xlm-roberta#encoder", "electra#encoder"])
def test_encoders_opened_as_decoders_are_refused(name):
    model = build(name)
    with pytest.raises(UserError, match=r"sees the tokens after it.*is_decoder=true"):
        SlotModel(model)


# Heads behind the choice of answer positions.


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("modernbert-decoder", "lm_head.dense"),
        ("bert", "cls.predictions.transform.dense"),
        ("roberta", "lm_head.dense"),
    ],
)
def test_targets_behind_the_answer_positions_are_right_in_a_cohort(name, head):
    found = examined(name)
    assert found["verdict"] == "right", found
    assert head in find_targets(build(name), "all-linear")


# What is left out.


def test_a_vision_tower_is_left_out_and_said():
    chosen = choose_targets(gemma3_with_a_tower(), "all-linear")
    assert chosen.shapes and not [n for n in chosen.shapes if "vision" in n or "multi_modal" in n]
    assert all("vision" in name or "multi_modal" in name for name in chosen.left_out)
    assert "lora covers " in chosen.note and "as no gradient reaches them" in chosen.note
    assert find_targets(gemma3_with_a_tower(), "q_proj,v_proj").keys() < chosen.shapes.keys()


def test_targets_that_are_all_in_the_tower_are_refused():
    with pytest.raises(UserError, match=r"'out_proj', and none of the 3 linears of 'gemma3'"):
        find_targets(gemma3_with_a_tower(), "out_proj")


@pytest.mark.parametrize(
    ("name", "without", "cause"),
    [
        ("mamba", {"dt_proj", "out_proj"}, "no gradient reaches them"),
        ("falcon_h1", {"out_proj"}, "PEFT refuses them in falcon_h1"),
        ("jamba", {"dt_proj"}, "no gradient reaches them"),
        ("llama4_text", {"router"}, "they return a tuple"),
        ("phimoe", {"router"}, "they return a tuple"),
        (
            "deepseek_v4",
            {"o_a_proj", "kv_proj", "gate_proj"},
            "more than a product with one matrix",
        ),
        ("deepseek_v3", {"gate_proj", "up_proj", "down_proj"}, "PEFT takes their names"),
        ("qwen3_next", {"gate_proj", "up_proj", "down_proj"}, "PEFT takes their names"),
    ],
)
def test_what_cannot_have_lora_is_left_out_with_its_cause(name, without, cause):
    chosen = choose_targets(build(name), "all-linear")
    assert leaves(chosen.left_out) == without
    assert cause in chosen.note


def test_a_second_look_at_a_model_runs_no_second_pass(monkeypatch):
    model = build("mixtral")
    first = choose_targets(model, "all-linear")
    monkeypatch.setattr(trial, "_run", None)
    assert choose_targets(model, "all-linear") == first
    assert set(find_targets(model, "q_proj")) < set(first.shapes)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_families_pass_the_trial_they_are_spared(name):
    model = build(name)
    assert is_plain(model)
    chosen = choose_targets(model, "all-linear")
    assert not chosen.note and not chosen.whole_logits
    assert trial.try_pass(model, chosen.shapes) == trial.Findings()


def test_the_findings_do_not_depend_on_weights_or_dtype():
    model = build("jamba")
    twin = build("jamba").to(torch.bfloat16)
    for parameter in twin.parameters():
        parameter.data.mul_(1.5)
    assert choose_targets(twin, "all-linear") == choose_targets(model, "all-linear")


# Models that change what a layer returns, and models that read a weight's dtype.


@pytest.mark.parametrize("name", ["gemma3n_text", "llama4_text", "hunyuan_v1_moe"])
def test_models_that_changed_a_view_or_read_a_weight_are_right(name):
    assert examined(name)["verdict"] == "right"


def test_a_layer_has_the_weight_and_bias_of_its_linear():
    linear = nn.Linear(3, 2)
    layer = LoRALinear(linear, name="x", in_features=3, out_features=2)
    assert layer.weight is linear.weight and layer.bias is linear.bias


# Generation.


@pytest.mark.parametrize(("name", "padded"), [("llama", True), ("mixtral", True), ("bart", False)])
def test_models_that_take_padding_for_text_share_passes_of_equal_prompts(name, padded, monkeypatch):
    slots = SlotModel(build(name))
    assert takes_padding(slots) is padded
    widths = []
    plain = slots.model.generate

    def watched(input_ids, **options):
        widths.append(int((options["attention_mask"] == 0).any()))
        return plain(input_ids=input_ids, **options)

    monkeypatch.setattr(slots.model, "generate", watched)
    slots.load([adapter(slots.shapes, 2, 1)])
    tokenizer = SimpleNamespace(
        eos_token_id=2, bos_token_id=1, batch_decode=lambda rows, **_: ["" for _ in rows]
    )
    options = {"max_new_tokens": 1, "batch_size": 8, "pad_token_id": 0}
    generate_answers(slots, [ROWS[0]], tokenizer=tokenizer, **options)
    assert any(widths) is padded


def test_a_model_that_cannot_generate_is_refused():
    with pytest.raises(UserError, match=r"'xlstm' cannot generate .* eval\.generate=never"):
        takes_padding(SlotModel(build("xlstm")))


# What is said.


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss", "qwen3_moe"])
def test_plan_says_the_coverage_that_simulate_says(name):
    model = build(name)
    share = choose_targets(model, "all-linear").note.partition(":")[0]
    assert share.startswith("lora covers ")
    with pytest.raises(UserError, match=f"'{name}' is a mixture of experts: {share}: experts"):
        shape_from_config(json.loads(model.config.to_json_string()))


def test_plan_says_what_config_does_not_tell():
    config = json.loads(build("deepseek_v3").config.to_json_string())
    with pytest.raises(UserError, match=r"config\.json does not tell what share"):
        shape_from_config(config)


def test_the_server_logs_what_its_clients_do_not_adapt(caplog):
    capability = Capability(client_id="a", coverage="lora covers 14 % of the weights: experts")
    member = Member(node_id=1, capability=capability, rank_class=None)
    roster = Roster(members={"a": member})
    assert roster.coverage == capability.coverage
    roster = SimpleNamespace(
        rank_classes={}, members=roster.members, left_out={}, coverage=roster.coverage
    )
    with caplog.at_level(logging.WARNING):
        LogObserver(logging.getLogger("said")).met(roster)
    assert "lora covers 14 %" in caplog.text
