"""Modelfiles for Ollama: the template gives the text of the chat template, and the file has the documented form."""

import json
import re

import gguf
import pytest

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.exporters.modelfile import modelfile
from tests.helpers.chat_templates import CHATML, DEEPSEEK, GEMMA, LLAMA_3, MISTRAL, PHI
from tests.helpers.commands import linked_copy, refused, succeed

ROLE, LAST = '{{ if eq .Role "user" }}', "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
LOOP = "{{ range $i, $_ := .Messages }}" + LAST + ROLE
ANSWER = '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}%s{{ end }}{{ end }}{{ end }}'
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
HEADER = "<|start_header_id|>%s<|end_header_id|>\n\n"

# These gave the text of the chat template in Go's own text/template, with and without a system message.
TEMPLATES = {
    "ChatML": (
        CHATML,
        "",
        "<|im_end|>",
        f"{{{{ if .System }}}}<|im_start|>system\n{{{{ $.System }}}}<|im_end|>\n{USER}{{{{ else }}}}"
        f"<|im_start|>system\nBe kind.<|im_end|>\n{USER}{{{{ end }}}}{LOOP}{{{{ .Content }}}}<|im_end|>\n{ASSISTANT}"
        + ANSWER
        % f"<|im_end|>\n{USER}",
    ),
    "Llama 3": (
        LLAMA_3,
        "<b>",
        "<|eot_id|>",
        "{{ if .System }}"
        + HEADER % "system"
        + "Date: 26 Jul{{ $.System }}<|eot_id|>"
        + HEADER % "user"
        + "{{ else }}"
        + HEADER % "system"
        + "Date: 26 Jul<|eot_id|>"
        + HEADER % "user"
        + "{{ end }}"
        + LOOP
        + "{{ .Content }}<|eot_id|>"
        + HEADER % "assistant"
        + ANSWER % ("<|eot_id|>" + HEADER % "user"),
    ),
    "Mistral": (
        MISTRAL,
        "<s>",
        "</s>",
        "[INST] " + LOOP + "{{ if and $last $.System }}{{ $.System }}\n\n{{ end }}{{ .Content }}{{ if $last }}[/INST]"
        "{{ else }}[/INST] {{ end }}" + ANSWER % "</s>[INST] ",
    ),
    "Gemma": (
        GEMMA,
        "<bos>",
        "<end_of_turn>",
        "{{ if .System }}<start_of_turn>user\n{{ $.System }}\n\n{{ else }}<start_of_turn>user\n{{ end }}"
        + LOOP
        + "{{ .Content }}<end_of_turn>\n<start_of_turn>model\n"
        + ANSWER % "<end_of_turn>\n<start_of_turn>user\n",
    ),
    "Phi": (
        PHI,
        "",
        "<|end|>",
        "{{ if .System }}<|system|>\n{{ $.System }}<|end|>\n<|user|>\n{{ else }}<|user|>\n{{ end }}"
        + LOOP
        + "{{ .Content }}<|end|>\n<|assistant|>\n"
        + ANSWER % "<|end|>\n<|user|>\n",
    ),
    "DeepSeek": (
        DEEPSEEK,
        "<b>",
        "<e>",
        "{{ if .System }}{{ $.System }}<\uff5cUser\uff5c>{{ else }}<\uff5cUser\uff5c>{{ end }}"
        + LOOP
        + "{{ .Content }}{{ if $last }}<\uff5cAssistant\uff5c><think>\n{{ else }}<\uff5cAssistant\uff5c>{{ end }}"
        + ANSWER % "<e><\uff5cUser\uff5c>",
    ),
}


def source(path, template, bos, eos, **sampling) -> GGUFSource:
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["a", eos, bos or "<b>"]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL])
    writer.add_eos_token_id(1)
    if bos:
        writer.add_bos_token_id(2)
    if template:
        writer.add_chat_template(template)
    for name, value in sampling.items():
        getattr(writer, f"add_sampling_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return GGUFSource(path)


def instructions(text: str) -> list[tuple[str, str]]:
    """Read a Modelfile by the grammar that Ollama documents; whatever is left over is an error."""
    instruction = re.compile(
        r'(FROM) (\S[^\n]*)\n|(TEMPLATE) """(.*?)"""\n|(PARAMETER) (\w+ (?:"[^"]*"|[-\d.e]+))\n', re.DOTALL
    )
    parts, place = [], 0
    while place < len(text):
        match = instruction.match(text, place)
        assert match, text[place:]
        parts.append(tuple(group for group in match.groups() if group is not None))
        place = match.end()
    return parts


@pytest.mark.parametrize("family", TEMPLATES)
def test_templates_of_known_families_are_translated(family, tmp_path):
    template, bos, eos, expected = TEMPLATES[family]
    text, notes = modelfile(source(tmp_path / "m.gguf", template, bos, eos), ["m.gguf"])
    assert instructions(text) == [("FROM", "./m.gguf"), ("TEMPLATE", expected), ("PARAMETER", f'stop "{eos}"')]
    assert ["takes no system message" in note for note in notes] == [True] * (family == "Gemma")


def test_what_cannot_be_translated_is_left_to_ollama(tmp_path):
    numbers = {"temp": 0.6, "top_k": 20, "penalty_repeat": 1.05}
    for template, words in (
        (None, "no chat template"),
        ("{{ strftime_now('%d') }}" + CHATML, "'strftime_now' is undefined"),
        (CHATML.replace("<|im_end|>", '"""'), "letters that a Modelfile cannot hold"),
        (CHATML.replace("{{ m.role }}", "{{ m.role ~ loop.index }}"), "writes later turns otherwise"),
    ):
        path = tmp_path / "m.gguf"
        text, (note,) = modelfile(source(path, template, "", "<|im_end|>", **numbers), ["m.gguf", "mmproj-m.gguf"])
        assert words in note
        assert instructions(text) == [
            ("FROM", "./m.gguf"),
            ("FROM", "./mmproj-m.gguf"),
            ("PARAMETER", 'stop "<|im_end|>"'),
            ("PARAMETER", "temperature 0.6"),
            ("PARAMETER", "top_k 20"),
            ("PARAMETER", "repeat_penalty 1.05"),
        ]
    braces = CHATML.replace("Be kind.", "{{ '{{ {x} }} {}}' }}").replace("{{ m.content }}", "{{ '{' ~ m.content }}")
    text, _ = modelfile(source(tmp_path / "m.gguf", braces, "", "<|im_end|>"), ["m.gguf"])
    assert 'system\n{{ "{{" }} {x} {{ "}}" }} {{ "{" }}{{ "}}" }}<|im_end|>' in text
    assert 'user\n{{ "{" }}{{ end }}' in text and "{{{" not in text


def test_export_writes_a_modelfile_and_says_the_faults_of_a_chat_template(small_moe, tmp_path):
    folder, config = linked_copy(small_moe, tmp_path / "model"), "tokenizer_config.json"
    numbers = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(numbers))
    (folder / config).unlink()
    (folder / config).write_text(json.dumps(json.loads((small_moe / config).read_text()) | {"chat_template": CHATML}))
    said = succeed("export", folder, "--preset", "f16", "-o", tmp_path / "m.gguf", "--modelfile")
    assert "the chat template writes <|im_start|>, <|im_end|>, of which this tokenizer has no" in said
    findings = json.loads(succeed("inspect", "--lint", tmp_path / "m.gguf", "--json"))["findings"]
    assert sum(finding["is_fault"] for finding in findings) == 2
    stored = {field.key: field.value for field in GGUFSource(tmp_path / "m.gguf").metadata}
    names = {"temp": 0.6, "top_p": 0.95, "top_k": 20, "penalty_repeat": 1.1}
    assert {name: stored[f"general.sampling.{name}"] for name in names} == pytest.approx(names)
    first, (_, template), *parameters = instructions((tmp_path / "m.Modelfile").read_text())
    assert first == ("FROM", "./m.gguf") and template == TEMPLATES["ChatML"][3]
    assert [value for _, value in parameters] == [
        'stop "<|im_end|>"',
        'stop "<|endoftext|>"',
        "temperature 0.6",
        "top_k 20",
        "top_p 0.95",
        "repeat_penalty 1.1",
    ]
    words = ("export", folder, "--preset", "f16", "--modelfile", "-o", tmp_path / "out.gguf")
    assert "--modelfile is for a GGUF model in one file" in refused(*words, "--split-max-size", "9MB")
