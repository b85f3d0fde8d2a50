"""Chat templates of our own that behave like those of well-known models. <|im_end|> is the eos of all of them."""

# Like Qwen3: thoughts stay after the last question only, and the last turn always has one.
QWEN3 = """
{%- if tools %}
    {%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
    {{- '<|im_start|>system\\n' + system + '# Tools' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(asked=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

# Like Qwen3 of July 2025: the cue opens a thought, and the template closes an empty one.
QWEN3_THINKING = QWEN3.replace("assistant\\n' }}\n    {%- if enable", "assistant\\n<think>\\n' }}\n    {%- if enable")

# Like the first DeepSeek-R1: thoughts are cut out of all turns.
R1 = """
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- message.content }}{%- endif %}
    {%- if message.role == 'user' %}{{- '<|User|>' + message.content }}{%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}
"""

# Like the later DeepSeek-R1: its cue opens a thought, too.
R1_OPEN = R1.replace("'<|Assistant|>' }}", "'<|Assistant|><think>\\n' }}")

# Like Llama 3.1: a system turn always, tools in it, and a turn is either text or a call.
LLAMA31 = """
{%- if messages[0].role == 'system' %}
    {%- set system, talk = messages[0].content | trim, messages[1:] %}
{%- else %}
    {%- set system, talk = '', messages %}
{%- endif %}
{{- '<|start|>system\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today: ' + (date_string if date_string is defined else '26 Jul 2024') + '\\n\\n' }}
{%- for tool in tools or [] %}{{- (tool | tojson(indent=4)) + '\\n\\n' }}{%- endfor %}
{{- system + '<|im_end|>' }}
{%- for message in talk %}
    {%- if message.role == 'tool' %}
        {{- '<|start|>ipython\\n' + (message.content | tojson) + '<|im_end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant\\n{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) }}
        {{- '}<|im_end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '\\n' + (message.content | trim) + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}
"""

# Like Mistral: the system text and the tools stand in the last question only.
MISTRAL = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set talk = messages[1:] if messages[0].role == 'system' else messages %}
{%- set ns = namespace(asked=-1) %}
{%- for message in talk %}{%- if message.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in talk %}
    {%- if message.role == 'user' %}
        {%- if loop.index0 == ns.asked and tools %}{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{%- endif %}
        {%- set before = system + '\\n\\n' if loop.index0 == ns.asked and system else '' %}
        {{- '[INST] ' + before + message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[CALLS][' }}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[RESULTS]{"content": ' + message.content + '}[/RESULTS]' }}
    {%- endif %}
{%- endfor %}
"""
