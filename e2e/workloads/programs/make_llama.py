"""Run while an image is built: a small Llama with random weights and a BPE tokenizer, as a checkpoint folder.

    python3 make_llama.py FOLDER

The tokenizer is trained on the Python library's own sources, so that it is a real one of its size.
"""

import pathlib
import sys
import sysconfig

import tokenizers
import torch
import transformers

VOCABULARY = 8192


def main() -> None:
    """Write FOLDER."""
    folder = sys.argv[1]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    sources = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer.train([str(path) for path in sources], vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main()
