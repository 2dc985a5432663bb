"""Chat templates that behave as the stock ones of known families do, written anew for the tests."""

from __future__ import annotations

LLAMA_31 = (  # a system turn with two dates in front of every conversation; white space around contents is trimmed
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- set given = messages[0].role == 'system' %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{- date_string + '\n\n' }}{%- if given %}{{- messages[0].content | trim }}{%- endif %}{{- '<|eot_id|>' }}"
    "{%- for m in (messages[1:] if given else messages) %}"
    "{%- set role = 'ipython' if m.role == 'tool' else m.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

LLAMA_32 = LLAMA_31.replace(  # the date is today's
    "{%- set date_string = '26 Jul 2024' %}", "{%- set date_string = strftime_now('%d %b %Y') %}"
)

QWEN_3 = (  # a think block in the turns after the last question, none before; the generation prompt can close one
    "{%- set last = namespace(question=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set parts = m.content.split('</think>') %}{%- set text = parts[-1].lstrip('\n') %}"
    "{%- set inside = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{%- set thought = m.reasoning_content or inside %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > last.question and (loop.last or thought) %}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}{{- text + '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)

GEMMA_3 = (  # no system turn: its text opens the first question; the turns must alternate
    "{{ bos_token }}{%- set given = messages[0].role == 'system' %}"
    "{%- set opening = messages[0].content + '\n\n' if given else '' %}"
    "{%- for m in (messages[1:] if given else messages) %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{%- endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (opening if loop.first else '') }}"
    "{{ m.content | trim }}{{ '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
)

MISTRAL = (  # EOS closes answers; the system text stands in the last question, so later turns move it
    "{{ bos_token }}{%- set given = messages[0].role == 'system' %}"
    "{%- for m in (messages[1:] if given else messages) %}"
    "{%- if m.role == 'user' %}"
    "{{ '[INST] ' + (messages[0].content + '\n\n' if given and loop.revindex0 < 2 else '') + m.content + '[/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{%- else %}{{ raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"
)

LLAMA_2 = (  # every question opens a text of its own, BOS included
    "{%- for m in messages %}{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{%- else %}{{ ' ' + m.content + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)

PHI_3 = (  # roles it does not know are skipped in silence; EOS after the whole conversation
    "{%- for m in messages %}{%- if m.role in ('system', 'user', 'assistant') %}"
    "{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"
)

MARKED = (  # ChatML with {% generation %}, its end-of-turn token outside the mark
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{- m.content }}{% endgeneration %}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

STOCK = {
    "llama31": LLAMA_31,
    "llama32": LLAMA_32,
    "qwen3": QWEN_3,
    "gemma3": GEMMA_3,
    "mistral": MISTRAL,
    "llama2": LLAMA_2,
    "phi3": PHI_3,
    "marked": MARKED,
}

BROKEN = {
    "two bos": LLAMA_31.replace("{{- bos_token }}", "{{- bos_token + bos_token }}"),
    "bos of its own": LLAMA_31.replace("{{- bos_token }}", "{{- ' ' + bos_token }}"),
    "no end": "{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}",
    "other opening": MARKED.replace(
        "{{- '<|im_start|>assistant\n' }}{%- endif", "{{- '<|im_start|>model\n' }}{%- endif"
    ),
    "opened thinking": MARKED.replace("{% generation %}", "")
    .replace("{% endgeneration %}", "")
    .replace("{{- '<|im_start|>assistant\n' }}{%- endif", "{{- '<|im_start|>assistant\n<think>' }}{%- endif"),
    "mark too late": MARKED.replace(
        "{% generation %}{{- m.content }}", "{{- m.content[:2] }}{% generation %}{{- m.content[2:] }}"
    ),
    "a mark too few": MARKED.replace("m.role == 'assistant' %}{% gen", "m.role == 'assistant' and loop.last %}{% gen"),
    "code that fails": "{{- messages[0].content + 3 }}",
    "undefined": "{{- messages[0].nothing.at_all }}",
}
