"""The model card: what it says, what it must never leave out, and that the Hub's own classes read it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest
from card_facts import BASE, NAME, facts
from folders import write
from huggingface_hub import ModelCard
from licence_texts import scout_files
from publishing import policy_named

from l4pack.errors import UsageError
from l4pack.publish.card import render_card
from l4pack.publish.card_facts import DeviceFit
from l4pack.publish.card_measured import with_error
from l4pack.publish.commands import typed as _typed
from l4pack.publish.licence import Card, audit
from l4pack.publish.markdown import safe

SAMPLE = {"tokens": 16, "answers": [
    {"prompt": "Why?", "artifact": {"text": "It is because"}, "original": {"text": "It is so"}},
    {"prompt": "How?", "artifact": {"text": "So"}, "original": None},
]}  # fmt: skip
ACCURACY = {
    "tokens": 65536, "text": {"name": "heldout", "sequence_length": 2048, "digests": ["x"]},
    "kl_mean": 0.0123, "kl_standard_error": 0.00041, "top1_agreement": 0.9612, "top1_agreement_standard_error": 0.0021,
    "perplexity_reference": 6.1234, "perplexity_reference_standard_error": 0.051,
    "perplexity_artifact": 6.2001, "perplexity_artifact_standard_error": 0.052,
    "perplexity_ratio": 1.0125, "perplexity_ratio_standard_error": 0.0008,
    "tasks": {"arc": {"questions": 100, "accuracy": {"value": 0.61, "standard_error": 0.05},
                      "accuracy_reference": {"value": 0.625, "standard_error": None}}},
}  # fmt: skip


def body(text: str) -> str:
    return " ".join(Card.parse(text).visible.split())


def test_the_card_meets_every_licence_duty(tmp_path):
    files = {**scout_files(), "README.md": render_card(facts()).encode()}
    result = audit(str(write(tmp_path / "out", files)))
    assert result.findings == ()
    assert result.name == NAME


def test_metadata_are_read_by_the_hubs_own_class():
    data = ModelCard(render_card(facts(languages=["en", "fr"]))).data
    assert (data.license, data.license_name) == ("other", "llama4")
    assert data.license_link.startswith("https://www.llama.com/llama4/")
    assert (data.base_model, data.base_model_relation) == ([BASE], "quantized")
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "image-text-to-text", ["en", "fr"])
    assert {"llama4", "compressed-tensors", "w4a16-g128"} <= set(data.tags)
    assert "extra_gated_prompt" not in data.to_dict()


def test_a_text_only_model_says_so():
    config = {key: value for key, value in facts().config.items() if key != "vision_config"}
    text = render_card(facts(config=config))
    assert ModelCard(text).data.pipeline_tag == "text-generation"
    assert "AutoModelForCausalLM" in text
    assert "AutoTokenizer" in text


def test_gating_fields_are_set_when_asked():
    data = ModelCard(render_card(facts(gated=True))).data.to_dict()
    assert data["extra_gated_eu_disallowed"] is True
    assert "Llama 4 Community License" in data["extra_gated_prompt"]
    assert data["extra_gated_fields"]["geo"] == "ip_location"


def test_what_was_not_measured_is_called_so():
    text = body(render_card(facts()))
    assert "**Not measured.**" in text
    assert "**Not computed.**" in text
    assert "Benchmark tasks: not measured. Image inputs: not measured." in text
    assert "Calibration | not recorded" in text
    assert "Fallbacks | not recorded" in text
    assert "Calibration | none: every weight is rounded by itself" in body(render_card(facts("int4-rtn")))


def test_cold_experts_and_fallbacks_are_results():
    record = {
        "text": {"name": "calibration", "samples": 256},
        "routed_tokens": {"layers.1": [5, 0, 7], "layers.3": [0, 0, 9]},
        "matrices": {"a": {"method": "gptq", "error": 1.0}, "b": {"method": "rtn", "reason": "x", "error": 1.0}},
    }
    text = body(render_card(facts(calibration=record)))
    assert "name calibration, samples 256; 3 of 6 experts saw no token" in text
    assert "1 of 2 matrices are rounded to nearest instead; l4pack-calibration.json lists them" in text


def test_measurements_stand_with_setting_and_error_bar():
    text = body(render_card(facts(accuracy=ACCURACY)))
    assert "same 65,536 tokens[^setting]" in text
    assert "[^setting]: name heldout, sequence length 2048." in text
    assert "| Perplexity | 6.123 ± 0.051 | 6.200 ± 0.052 |" in text
    assert "nats a token | 0 | 0.01230 ± 0.00041 |" in text
    assert "as the original | 1 | 0.9612 ± 0.0021 |" in text
    assert "| Task arc, 100 questions, accuracy | 0.625 (one sequence: no error bar) | 0.610 ± 0.050 |" in text
    assert "Not measured.**" not in text
    assert "Benchmark tasks" not in text


@pytest.mark.parametrize("key", ["tokens", "kl_standard_error", "perplexity_reference", "top1_agreement"])
def test_a_number_without_its_pair_or_error_bar_is_refused(key):
    with pytest.raises(UsageError, match=key):
        render_card(facts(accuracy={name: value for name, value in ACCURACY.items() if name != key}))
    with pytest.raises(UsageError, match="no number"):
        render_card(facts(accuracy={**ACCURACY, key: "many"}))


def test_a_number_that_is_not_paired_is_no_measurement():
    assert "**Not measured.**" in render_card(facts(accuracy={"tokens": 100, "perplexity_artifact": 6.2}))


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (6.2, 0.0512, "6.200 ± 0.051"),
        (1234.5, 99.0, "1234 ± 99"),
        (0.5, 0.0, "0.5000 ± 0.0000"),
        (1.0, 1e-12, "1.00000000 ± 0.00000000"),
    ],
)
def test_error_bars_decide_the_digits(value, error, text):
    assert with_error(value, error) == text


def commands(text: str) -> list[list[str]]:
    """The words of each command in the card's shell blocks, but for those that install."""
    blocks = re.findall(r"^```shell\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [block.replace("\\\n", " ") for block in blocks]
    kept = ["\n".join(line for line in block.splitlines() if not line.startswith("pip ")) for block in lines]
    return [shlex.split(block) for block in kept if block.strip()]


def test_commands_fit_the_artifact():
    rows = [
        DeviceFit("1 x RTX 5090", 1, 0, 0),
        DeviceFit("H100", 1, 5248, 77536),
        DeviceFit("3 x odd", None, 0, 0),
        DeviceFit("8 x H100", 8, 1000000, 1000000),
    ]
    served = {"vllm": f"vllm serve ORG/{NAME} --max-model-len 65536 --max-num-seqs 16"}
    text = render_card(facts(fits=rows, served=served, serves="1 x H100, 65,536 tokens, FP8 KV cache"))
    vllm, ask, make = commands(text)
    assert vllm == ["vllm", "serve", f"ORG/{NAME}", "--max-model-len", "65536", "--max-num-seqs", "16"]
    sent = json.loads(ask[-1])
    assert sent["model"] == f"ORG/{NAME}"
    assert [part["type"] for part in sent["messages"][0]["content"]] == ["text", "image_url"]
    assert make == ["l4pack", "quantize", "llama-4-scout", "--recipe", "scout-int4-1xh100", "--out", NAME]
    assert "| 1 x RTX 5090 | 1 | too large | too large |" in text
    assert "| H100 | 1 | 5,248 | 77,536 |" in text
    assert "| 3 x odd |  | can't be split | can't be split |" in text
    assert "- **Where it runs**: 1 x H100, 65,536 tokens, FP8 KV cache" in text
    assert "SGLang does not read quantized attention" in text
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")


def test_the_verdict_stands_at_the_top():
    what, where, close = re.findall(r"^- \*\*.*$", render_card(facts(accuracy=ACCURACY)), re.MULTILINE)[-3:]
    assert what.startswith("- **What it is**: ")
    assert where == "- **Where it runs**: not computed"
    assert "KL divergence 0.01230 ± 0.00041 nats a token, the same likeliest token 96.1 % of the time" in close


def test_the_sources_sampling_and_safeguards_are_on_the_card():
    text = render_card(facts(generation={"temperature": 0.6, "top_p": 0.9, "top_k": "many", "do_sample": True}))
    assert "sample with temperature 0.6, top_p 0.9 (`generation_config.json`)" in text
    assert "meta-llama/Llama-Guard-4-12B" in text
    assert "meta-llama/Llama-Prompt-Guard-2-86M" in text
    assert "sample with" not in render_card(facts())
    assert "## Safeguards" not in render_card(facts(policy=policy_named("mit")))


def test_the_hubs_index_holds_what_was_measured():
    results = ModelCard(render_card(facts(accuracy=ACCURACY))).data.eval_results
    found = {result.metric_type: result.metric_value for result in results}
    assert found == {"kl_mean": 0.0123, "top1_agreement": 0.9612, "perplexity_artifact": 6.2001, "accuracy": 0.61}
    assert ModelCard(render_card(facts())).data.eval_results is None


def test_a_repository_takes_the_placeholders_place():
    text = render_card(facts(repository="some-org/Llama-4-x"))
    assert "ORG/" not in text
    assert commands(text)[0] == ["vllm", "serve", "some-org/Llama-4-x"]


def test_the_command_has_the_options_of_the_manifest():
    made = facts()
    options = {"--recipe": "int4", "--calibration": "my notes.txt", "--calibration-samples": 8, "--seed": 7}
    source = {**made.manifest["source"], "name": "tuned"}
    text = render_card(replace(made, manifest={**made.manifest, "source": source, "job": {"options": options}}))
    *_, make = commands(text)
    shown = ["--recipe", "int4", "--calibration", "my notes.txt", "--calibration-samples", "8", "--seed", "7"]
    assert make == ["l4pack", "quantize", "tuned", *shown, "--out", NAME]


def test_sglang_gets_a_command_when_it_reads_the_artifact():
    served = {"sglang": f"python -m sglang.launch_server --model-path ORG/{NAME} --context-length 131072 --tp 4"}
    text = render_card(facts("maverick-int4-4xh100", served=served))
    assert "does not read" not in text
    _, _, sglang, _ = commands(text)
    assert sglang[3:] == ["--model-path", f"ORG/{NAME}", "--context-length", "131072", "--tp", "4"]


def test_without_a_promise_and_a_budget_the_commands_promise_nothing():
    vllm, _, sglang, _ = commands(render_card(facts("int4")))
    assert vllm == ["vllm", "serve", f"ORG/{NAME}"]
    assert sglang[-1] == f"ORG/{NAME}"


@pytest.mark.parametrize(
    ("recipe", "rows"),
    [
        ("int4-uniform", ["routed expert, shared expert | W4A16-g128", "attention, router, norm"]),
        ("int4", ["routed expert | W4A16-g128", "shared expert | W8A16-g128", "attention, router, norm"]),
        ("meta-fp8", ["routed expert | as in the original in layers 0, 47; FP8-dynamic in layers 1-46"]),
    ],
)
def test_every_role_is_accounted_for(recipe, rows):
    text = body(render_card(facts(recipe)))
    assert all(row in text for row in rows)
    assert "vision" in text


OWN = "# {{ name }}\n\nMine.\n"


def test_a_users_template_replaces_the_text_and_never_the_licence(tmp_path):
    own = tmp_path / "card.jinja"
    own.write_text(OWN)
    text = render_card(facts(), own)
    assert "Mine." in text
    assert "Serving" not in text
    files = {**scout_files(), "README.md": text.encode()}
    assert audit(str(write(tmp_path / "out", files)), name=NAME).findings == ()
    own.write_text("# {{ name }}\n\n{{ licence_block }}\n\nMine.\n")
    assert render_card(facts(), own).count("**Built with Llama**") == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ nonsense }}", "nonsense"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ source.update({}) }}", "unsafe|not safely callable"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_a_usage_error(tmp_path, template, message):
    own = tmp_path / "card.jinja"
    own.write_text(template)
    with pytest.raises(UsageError, match=message):
        render_card(facts(), own)
    with pytest.raises(UsageError, match="can't be read"):
        render_card(facts(), tmp_path / "absent")


ENDLESS = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'x' * 10000000000 }}", "a wide number": "{{ '%3000000000d' | format(1) }}",
    "doubling": "{% set ns = namespace(a='x' * 1000) %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "a long page": "{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
    "division": "{{ 1 // 0 }}", "another file": "{% include '/etc/passwd' %}", "types": "{{ name + 1 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}  # fmt: skip


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_well_ends_soon(tmp_path, monkeypatch, template):
    monkeypatch.setattr("l4pack.publish.template.SECONDS", 1)
    own = tmp_path / "card.jinja"
    own.write_text(template)
    with pytest.raises(UsageError) as caught:
        render_card(facts(), own)
    assert "card.jinja" in caught.value.message
    assert len(caught.value.message) < 500


HOSTILE = "[x](https://evil.example) <b>https://evil.example www.evil.example a@evil.example ![](x) &lt; \n# H | * _"


def test_what_looks_like_markup_becomes_code():
    assert safe("Int4 in groups of 128: FP8, W4A16-g128 (1.5 %)") == "Int4 in groups of 128: FP8, W4A16-g128 (1.5 %)"
    for part in (*HOSTILE.split(" "), "https://a", "www.a", "a@b.c", "mailto:a", "[a]", "*a*", "#a", "a&lt;b", "\\"):
        shown = safe(part)
        assert shown.startswith("`") or (all(mark not in shown for mark in "[]<>*#&@/\\!|~") and "www" not in shown), (
            part
        )


def test_images_are_called_measured_only_where_they_were():
    seen = {**ACCURACY, "text": {**ACCURACY["text"], "images": 12}}
    assert "Image inputs: not measured." in render_card(facts(accuracy=ACCURACY))
    assert "Image inputs: measured, 12 images." in render_card(facts(accuracy=ACCURACY, others=[seen]))


def test_a_sample_is_bold_from_where_the_models_part():
    text = render_card(facts(accuracy={**ACCURACY, "sample": SAMPLE}))
    assert "the likeliest token each time, 16 at most" in text
    assert "| `Why?` | `It is` **`so`** | `It is` **`because`** |" in text
    assert "| `How?` | not asked | `So` |" in text


def test_no_link_or_markup_survives_from_a_record():
    said = {"prompt": HOSTILE, "artifact": {"text": HOSTILE}, "original": {"text": f"{HOSTILE} {HOSTILE}"}}
    changes = {"text": {"source": HOSTILE}, "tasks": {HOSTILE: ACCURACY["tasks"]["arc"]}}
    made = facts(accuracy={**ACCURACY, **changes, "sample": {"tokens": 1, "answers": [said]}})
    manifest = {**made.manifest, "l4pack_version": HOSTILE, "recipe": {**made.manifest["recipe"], "title": HOSTILE}}
    text = re.sub(r"`[^`\n]*`", "", Card.parse(render_card(replace(made, manifest=manifest))).visible)
    assert "evil" not in text
    assert "<b>" not in text


def test_text_from_outside_is_nothing_but_text():
    made = facts(base_model=None)
    source = {**made.manifest["source"], "name": "x`\n\n# Not a heading <script>|", "revision": "a`b"}
    text = render_card(replace(made, manifest={**made.manifest, "source": source}))
    assert "\n# Not" not in text
    assert "<script>" not in text
    assert "x # Not a heading script" in text


def test_the_same_facts_give_the_same_bytes():
    assert render_card(facts(accuracy=ACCURACY)) == render_card(facts(accuracy=ACCURACY))


def test_another_licence_brings_its_own_block():
    text = render_card(facts(policy=policy_named("apache-2.0"), base_model=None))
    assert ModelCard(text).data.license == "apache-2.0"
    assert policy_named("apache-2.0").block.strip() in text
    assert "Built with Llama" not in text


def test_options_are_typed_as_the_command_takes_them():
    options = {"--samples": 4, "--include": ["a.txt", "b c"], "--keep-float32": True}
    typed = [part for option, value in options.items() for part in _typed(option, value)]
    assert typed == ["--samples", "4", "--include", "a.txt", "--include", "b c", "--keep-float32"]


REFUSALS = {
    "suite": "refusals", "sha256": "a" * 64, "openings": 12, "chat_template": True,
    "harmful": {"requests": 40, "probability_artifact": {"value": 0.9, "standard_error": 0.02}, "refused_artifact": 36,
                "probability_original": {"value": 0.95, "standard_error": 0.02}, "refused_original": 38,
                "probability_change": {"value": -0.05, "standard_error": 0.01}, "refused_by_artifact_only": 0,
                "refused_by_original_only": 2, "p_value": 0.5},
    "harmless": {"requests": 40, "probability_artifact": {"value": 0.01, "standard_error": None}, "refused_artifact": 0},
}  # fmt: skip


def test_refusal_drift_stands_under_safeguards():
    text = render_card(facts(accuracy={**ACCURACY, "refusals": REFUSALS}))
    safeguards = text.partition("## Safeguards")[2].partition("## Limits")[0]
    assert "| 40 harmful requests | 95.00 % | 90.00 % | -5.00 ± 1.00 % |" in safeguards
    assert "| 40 harmless requests | not measured | 1.00 % | not measured |" in safeguards
    assert "2 the original alone" in safeguards
    assert "Llama Guard" in " ".join(safeguards.split())


def test_refusal_drift_that_was_not_measured_is_said():
    assert "Refusal drift: not measured" in render_card(facts(accuracy=ACCURACY))


def test_a_set_of_tasks_has_a_row_with_its_recovery():
    suite = {"title": "Open LLM Leaderboard, version 1", "tasks": ["arc_challenge", "mmlu"], "left_out": ["gsm8k"],
             "mean": 0.7, "mean_reference": 0.71, "recovery_percent": 98.63}  # fmt: skip
    text = render_card(facts(accuracy={**ACCURACY, "suites": {"openllm": suite}}))
    row = "| Open LLM Leaderboard, version 1: mean of 2 tasks, without gsm8k | 0.7100 | 0.7000, recovery 98.6 % |"
    assert row in text
