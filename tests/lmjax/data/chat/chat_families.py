"""The chat families: what their templates do, and the special tokens of their tokenizers.

The templates are our own; they do what the published ones of the family do.
"""

import dataclasses

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Says how the weather is: <b>, "ü".',
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "Where & “how”"}},
            "required": ["place"],
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A chat family.

    Attributes:
      template: in Jinja's language.
      tokens: the special tokens, in the order of their ids.
      kind: of tokenizer; see `chat_folders.build`.
      system: whether the template takes a system message.
      tools: whether it takes tools.
      end: what ends a document.
      begin: what begins one.
      stops: special tokens that end a reply by the template.
      words: added tokens that are no special ones.
      tool_role: what the template calls the role `observation`.
    """

    template: str
    tokens: tuple[str, ...]
    kind: str = "bytes"
    system: bool = True
    tools: bool = False
    begin: str | None = None
    end: str = "</s>"
    stops: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    tool_role: str = "tool"


CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' and default_text %}
        {{- '<|im_start|>system\\n' + default_text + '<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TURNS_ONLY = """\
{%- if messages[0].role == 'system' %}
    {%- set said = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set said = none %}
    {%- set turns = messages %}
{%- endif %}
"""
ALTERNATE = """\
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Turns of user and assistant have to alternate.') }}
    {%- endif %}
"""
NO_SYSTEM = """\
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('There is no role for the system here.') }}
{%- endif %}
{%- set turns = messages %}
"""

FAMILIES = {
    "qwen": Family(
        "{% set default_text = 'You are a helpful assistant.' %}" + CHATML,
        CHATML_TOKENS,
        end="<|endoftext|>",
        stops=("<|im_end|>",),
    ),
    "qwen2.5": Family(
        """\
{%- set usual = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{%- set given = messages[0].content if messages[0].role == 'system' else usual %}
{{- '<|im_start|>system\\n' + given }}
{%- if tools %}
    {{- '\\n\\n# Tools\\n\\nYou can call these:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
        (*CHATML_TOKENS, "<|object_ref_start|>"),
        tools=True,
        end="<|im_end|>",
        stops=("<|im_end|>",),
        words=("<tool_call>", "</tool_call>"),
    ),
    "qwen3": Family(
        """\
{%- set found = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set found.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought, answer = '', message.content %}
        {%- if '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].rstrip('\\n') %}
            {%- set thought = thought.split('<think>')[-1].lstrip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > found.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
        {%- else %}
            {{- answer }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
        (*CHATML_TOKENS, "<|object_ref_start|>"),
        end="<|im_end|>",
        stops=("<|im_end|>",),
        words=("<think>", "</think>"),
    ),
    "llama2": Family(
        TURNS_ONLY
        + ALTERNATE
        + """\
    {%- if turn.role == 'user' %}
        {%- set text = turn.content | trim %}
        {%- if loop.first and said is not none %}
            {%- set text = '<<SYS>>\\n' + said + '\\n<</SYS>>\\n\\n' + text %}
        {%- endif %}
        {{- bos_token + '[INST] ' + text + ' [/INST]' }}
    {%- else %}
        {{- ' ' + turn.content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
""",
        ("<unk>", "<s>", "</s>"),
        kind="prepended",
        begin="<s>",
        stops=("</s>",),
    ),
    "mistral": Family(
        NO_SYSTEM
        + "{{- bos_token }}"
        + ALTERNATE
        + """\
    {%- if turn.role == 'user' %}
        {{- '[INST] ' + turn.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + turn.content + eos_token }}
    {%- endif %}
{%- endfor %}
""",
        ("<unk>", "<s>", "</s>"),
        kind="first",
        system=False,
        begin="<s>",
        stops=("</s>",),
    ),
    "mistral_v3": Family(
        TURNS_ONLY
        + """\
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}
        {%- if tools and loop.last %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson }}
            {{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}
        {%- if loop.last and said is not none %}{{ said + '\\n\\n' }}{% endif %}
        {{- turn.content + '[/INST]' }}
    {%- elif turn.tool_calls %}
        {{- '[TOOL_CALLS] ' + turn.tool_calls | map(attribute='function') | list | tojson }}
        {{- eos_token }}
    {%- elif turn.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + turn.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- ' ' + turn.content + eos_token }}
    {%- endif %}
{%- endfor %}
""",
        (
            *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
            *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        kind="first",
        tools=True,
        begin="<s>",
        stops=("</s>",),
    ),
    "gemma": Family(
        NO_SYSTEM
        + "{{ bos_token }}"
        + ALTERNATE
        + """\
    {%- set role = 'model' if turn.role == 'assistant' else turn.role %}
    {{- '<start_of_turn>' + role + '\\n' + turn.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}
""",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        kind="replaced",
        system=False,
        begin="<bos>",
        end="<eos>",
        stops=("<end_of_turn>",),
        words=("\n\n", "  "),
    ),
    "zephyr": Family(
        """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endgeneration %}

{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
        ("<unk>", "<s>", "</s>"),
        kind="prepended",
        begin="<s>",
        stops=("</s>",),
    ),
    "phi3": Family(
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content']"
        " + '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}"
        "{% else %}{{ eos_token }}{% endif %}",
        ("<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
        kind="stripped",
        begin="<s>",
        end="<|endoftext|>",
        stops=("<|end|>",),
    ),
    "falcon": Family(
        "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ '\\nUser: ' + message['content'] }}"
        "{% else %}{{ '\\nAssistant: ' + message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}",
        (">>TITLE<<", "<|endoftext|>"),
        end="<|endoftext|>",
    ),
    "chatglm2": Family(
        NO_SYSTEM
        + """\
{{- '[gMASK]sop' }}
{%- set round = namespace(number=0) %}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}
        {%- set round.number = round.number + 1 %}
        {{- '[Round ' ~ round.number ~ ']\\n\\n问：' ~ turn.content ~ '\\n\\n答：' }}
    {%- else %}
        {{- turn.content + '\\n\\n' }}
    {%- endif %}
{%- endfor %}
""",
        ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "</s>"),
        system=False,
    ),
    "chatglm3": Family(
        "{% for message in messages %}{% if loop.first %}[gMASK]sop{% endif %}"
        "<|{{ message['role'] }}|>\n {{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        (
            *("<unk>", "</s>", "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
            *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ),
        kind="prepended",
        stops=("<|user|>",),
        tool_role="observation",
    ),
    "glm4": Family(
        """\
[gMASK]<sop>
{%- for tool in tools or [] %}
    {{- '<|system|>\n' + tool | tojson(indent=4) }}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role in ('system', 'user', 'assistant') %}
        {{- '<|' + message.role + '|>\n' + message.content }}
    {%- elif message.role == 'observation' %}
        {{- '<|observation|>\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}
""",
        (
            *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
            *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ),
        tools=True,
        end="<|endoftext|>",
        stops=("<|user|>",),
        tool_role="observation",
    ),
    "baichuan2": Family(
        "{% for message in messages %}{% if message['role'] == 'user' %}<reserved_106>"
        "{% elif message['role'] == 'assistant' %}<reserved_107>{% endif %}"
        "{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<reserved_107>{% endif %}",
        ("<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"),
        kind="prepended",
        stops=("<reserved_106>",),
    ),
    "llama3": Family(
        """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set said, turns = messages[0]['content'] | trim, messages[1:] %}
{%- else %}
    {%- set said, turns = '', messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{{- said + '<|eot_id|>' }}
{%- for turn in turns %}
    {%- if loop.first and tools is not none %}
        {{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with a call of these:\\n\\n' }}
        {%- for tool in tools %}
            {{- tool | tojson(indent=4) + '\\n\\n' }}
        {%- endfor %}
        {{- turn.content | trim + '<|eot_id|>' }}
    {%- elif turn.tool_calls is defined %}
        {%- set call = turn.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name }}
        {{- '", "parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {%- set role = 'ipython' if turn.role == 'tool' else turn.role %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
        {{- turn.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
        (
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        ),
        tools=True,
        begin="<|begin_of_text|>",
        end="<|end_of_text|>",
        stops=("<|eot_id|>",),
    ),
}
