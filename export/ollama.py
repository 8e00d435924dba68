"""The Modelfile beside a GGUF file: what Ollama needs to know besides the weights.

Ollama does not read the chat template in the file. It has a language of its own for templates, Go's text/template;
what follows says in it what CHAT_TEMPLATE says in Jinja. Its names: `.System` all system texts in one, `.Messages`
the conversation, `.Tools` the functions as JSON (https://docs.ollama.com/template).
"""

from model.chat_template import TOOLS_EXAMPLE, TOOLS_HEAD, TOOLS_TAIL

CHAT = (
    """\
{{- if or .System .Tools }}<|im_start|>system
{{ .System }}
{{- if .Tools }}
{{- if .System }}

{{ end }}TOOLS_HEAD
{{- range .Tools }}
{{ . }}
{{- end }}TOOLS_TAIL<tool_call>TOOLS_EXAMPLE</tool_call>
{{- end }}<|im_end|>
{{ end }}
{{- $before := "" }}
{{- range $i, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if and (eq $before "tool") (ne .Role "tool") }}<|im_end|>
{{ end }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "tool" }}
{{- if eq $before "tool" }}
{{ else }}<|im_start|>user
{{ end }}<tool_response>
{{ .Content }}
</tool_response>
{{- else if eq .Role "assistant" }}<|im_start|>assistant
{{ if .Thinking }}<think>
{{ .Thinking }}
</think>

{{ end }}{{ .Content }}
{{- range $j, $call := .ToolCalls }}
{{- if or $message.Content $j }}
{{ end }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>
{{- end }}
{{- if not $last }}<|im_end|>
{{ end }}
{{- end }}
{{- $before = .Role }}
{{- end }}
{{- if eq $before "tool" }}<|im_end|>
{{ end }}
{{- if ne $before "assistant" }}<|im_start|>assistant
{{ end }}""".replace("TOOLS_HEAD", TOOLS_HEAD.rstrip())
    .replace("TOOLS_TAIL", TOOLS_TAIL)
    .replace("TOOLS_EXAMPLE", TOOLS_EXAMPLE)
)
OUR_SENTENCE = TOOLS_HEAD.splitlines()[-1]  # by which CHAT_TEMPLATE is known among others
OTHER_CHAT = """\
{{- range .Messages }}BOS{{ .Role }}
{{ .Content }}EOS
{{ end }}BOSassistant
"""  # the turns of MiniMind's own templates, in the markers of their vocabulary


def modelfile(gguf_name: str, tokenizer, base: bool) -> str:
    """The text. gguf_name: the file, beside this one. base: a model that continues text and does not chat."""
    start, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
    if base:
        template = "{{ .Prompt }}"  # the file says that the start token comes first
    elif OUR_SENTENCE in (tokenizer.chat_template or ""):
        template = CHAT
    else:
        template = OTHER_CHAT.replace("BOS", start).replace("EOS", end)
    return (
        f"# ollama create NAME -f Modelfile && ollama run NAME\n"
        f'FROM ./{gguf_name}\nTEMPLATE """{template}"""\nPARAMETER stop "{end}"\n'
        f"PARAMETER temperature 0.85\nPARAMETER top_p 0.85\n"
    )
