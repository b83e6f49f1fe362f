"""What a chat template renders, and what the lint says of it."""

import json

import pytest

from dynquant.errors import CheckpointError
from dynquant.families.tokenizers import chat_template
from dynquant.families.tokenizers.chat_template import ChatFormat, ChatTemplateError, chat, chat_format, lint
from tests.helpers.chat_templates import CHATML, DEEPSEEK, GEMMA, LLAMA_3, MISTRAL, PHI
from tests.helpers.commands import linked_copy, succeed

END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
CHATML_TOKENS = frozenset({"<|im_start|>", "<|im_end|>"})


def form(template, bos="", end="<|im_end|>", tokens=frozenset(), adds_bos=None):
    return ChatFormat(template, tokens, bos, (end,), adds_bos)


def faults(*arguments, **options) -> list[str]:
    return [finding.text for finding in lint(form(*arguments, **options)) if finding.is_fault]


def test_templates_of_known_families_have_no_faults_and_say_where_messages_stand():
    for template, bos, end in (
        (CHATML, "", "<|im_end|>"),
        (LLAMA_3, "<b>", "<|eot_id|>"),
        (MISTRAL, "<s>", "</s>"),
        (GEMMA, "<bos>", "<end_of_turn>"),
        (PHI, "", "<|end|>"),
        (DEEPSEEK, "<b>", END),
    ):
        assert faults(template, bos, end) == []
    parts = form(PHI, end="<|end|>").surroundings()
    assert (parts.start, parts.answer, parts.next) == ("<|user|>\n", "<|end|>\n<|assistant|>\n", "<|end|>\n<|user|>\n")
    refused = [finding for finding in lint(form(GEMMA, "<bos>", "<end_of_turn>")) if "refuses it" in finding.text]
    assert "no system role (a system message)" in refused[0].text and not refused[0].is_fault


@pytest.mark.parametrize(
    ("edit", "options", "words"),
    [
        (("{% endfor %}", "{% end %}"), {}, "no valid Jinja template: line"),
        (("{{ m.content }}", ""), {}, "writes a message 0 times"),
        (("{{ m.content }}", "{{ m.content * 2 }}"), {}, "writes a message 2 times"),
        (("{{ m.content }}", "{{ m.text.trim() }}"), {}, "the chat template fails"),
        (("{% if add_generation_prompt %}", "{% if false %}"), {}, "add_generation_prompt adds nothing"),
        (("<|im_end|>\n{% endfor", "<|im_emd|>\n{% endfor"), {"tokens": CHATML_TOKENS}, "<|im_emd|>, of which this"),
        ((), {"end": "<|endoftext|>"}, r"none of the tokens that end generation (<|endoftext|>)"),
        ((), {"bos": "<s>", "adds_bos": True}, "but the chat template does not write it"),
        (("{%- if", "{{ bos_token * 2 }}{%- if"), {"bos": "<s>"}, "writes BOS (<s>) twice"),
        (("{{ m.role }}", "{{ m.role if loop.index < 3 else 'x' }}"), {}, "something else around later turns"),
        (("{% for m in messages", "{% for m in messages if m.role != 'system'"), {}, "leaves out part of a system"),
        (("in messages", "in messages[-3:]"), {}, "0 times, or out of its order (three questions and two answers)"),
        (("{% for m", "{% for i in [1] %}" * 25 + "{% endfor %}" * 25 + "{% for m"), {}, "fails: too many statically"),
        (("{% for m", "{% for i in [1] %}" * 120 + "{% endfor %}" * 120 + "{% for m"), {}, "fails: too many"),
        (("{% for m", "{{ cycler() }}{% for m"), {}, "the chat template fails: at least one item"),
        (
            ("{% for m", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% for m"),
            {},
            "not done after 0 seconds",
        ),
    ],
)
def test_faults_are_told(edit, options, words, monkeypatch):
    monkeypatch.setattr(chat_template, "_SECONDS", 0.3)
    template = CHATML.replace(*edit) if edit else CHATML
    assert template != CHATML or options
    assert any(words in fault for fault in faults(template, **options)), faults(template, **options)


@pytest.mark.parametrize(
    ("condition", "what"),
    [("messages | length > 4", "three questions and two answers"), ("not add_generation_prompt", "a question without")],
)
def test_a_refusal_is_no_fault_and_ends_no_lint(condition, what):
    template = "{% if " + condition + " %}{{ raise_exception('not I') }}{% endif %}" + CHATML
    assert faults(template, tokens=CHATML_TOKENS) == []
    assert any(f"refuses it: not I ({what}" in finding.text for finding in lint(form(template)))


def test_a_template_renders_as_in_transformers():
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = chat("a <b> & \u2581", "c", "d", system="s")
    dumped = "{{ messages | tojson(indent=2) }}{{ messages | tojson(1, 2) }}"
    generation = "{% generation %}" + dumped + "\n{% endgeneration %}{{ bos_token }}"
    for template in (CHATML, PHI, DEEPSEEK, LLAMA_3, generation):
        (expected,), _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, bos_token="<b>", eos_token="<e>"
        )
        assert form(template, "<b>", "<e>").render(messages) == expected


def test_the_sandbox_keeps_a_template_from_what_is_not_its_own():
    for reach in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% include '/etc/passwd' %}"):
        with pytest.raises(ChatTemplateError):
            form(reach + CHATML).render(chat("a") if "mro" not in reach else chat("\u2983"))
            raise ChatTemplateError("rendered to nothing")


def test_the_command_lints_a_directory(small_moe, tmp_path):
    folder = linked_copy(small_moe, tmp_path / "model")
    config = json.loads((small_moe / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    said = succeed("inspect", "--lint", folder)
    assert "fault: the chat template writes <|im_start|>, <|im_end|>, of which this tokenizer has no" in said
    assert "2 faults in chat template and special tokens" in said
    with pytest.raises(CheckpointError, match="nothing"):
        chat_format(tmp_path / "nothing.gguf")


@pytest.mark.nightly
def test_templates_of_many_models_are_rendered(llama_cpp_tree):
    folder = llama_cpp_tree / "models" / "templates"
    if not folder.is_dir():
        pytest.skip("this source tree of llama.cpp has no chat templates")
    texts = [path.read_text("utf-8") for path in folder.glob("*.jinja")]
    broken = [text for text in texts if any("something else" in fault for fault in faults(text, "<b>"))]
    assert len(texts) > 40 and not broken


def test_a_folder_without_a_model_has_nothing_to_lint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json and no tokenizer"):
        chat_format(tmp_path)
