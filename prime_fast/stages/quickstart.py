"""The quickstart's task, made from seeds: `python -m prime_fast.stages.quickstart OUT_DIR`.

Chains of arithmetic modulo 10, evaluated left to right with every step written: the prompt `3*9+6*8*2:` is answered by
`3*9=7,7+6=3,3*8=4,4*2=8`. A fixed quarter of the 270 one-step facts are misconceptions: the demonstrations get them
wrong most of the time, always in the same way, and carry on from what they wrote. A model trained on them is wrong when
greedy and right now and then when sampled: reinforcement learning has something to find and a way to find it.

Only the standard library and numpy are imported at the top: reward workers import `compute_score` from here.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

CHARACTERS = "_$0123456789+-*=,:"
PAD, EOS = "_", "$"
OPERATORS = "+-*"
FACTS = [(a, operator, b) for a in range(10) for operator in OPERATORS for b in range(1, 10)]
MISCONCEPTIONS = 68  # of the 270 facts
MISCONCEPTION_RATE = 0.65  # how often a demonstration gets such a fact wrong
MISCONCEPTION_SEED = 1234  # which facts, and which wrong results: part of the task, the same for every seed
STEP = re.compile(r"(\d)([-+*])(\d)=(\d)")
TRAIN, EVAL, DEMONSTRATIONS = range(3)  # streams of random numbers under one seed


def apply(a: int, operator: str, b: int) -> int:
    """The true result of one step, 0..9."""
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


def misconceptions() -> dict[tuple[int, str, int], int]:
    """Fact -> the wrong result that demonstrations give for it."""
    return wrong_results(FACTS, MISCONCEPTIONS, apply, 10)


def wrong_results(facts: Sequence[tuple], count: int, apply: Callable[..., int], results: int) -> dict[tuple, int]:
    """`count` of the facts -> another result than apply(*fact), in 0..results-1."""
    random = np.random.default_rng(MISCONCEPTION_SEED)
    chosen = [facts[i] for i in random.choice(len(facts), count, replace=False)]
    return {fact: int((apply(*fact) + random.integers(1, results)) % results) for fact in chosen}


def problem(random: np.random.Generator, chain: int) -> str:
    """A prompt of `chain` steps: a digit 0..9, then `chain` times an operator and an operand 1..9."""
    start, operators, operands = random.integers(10), random.integers(3, size=chain), random.integers(1, 10, size=chain)
    return str(start) + "".join(OPERATORS[o] + str(b) for o, b in zip(operators, operands, strict=True)) + ":"


def solve(prompt: str, result=apply) -> str:
    """The worked answer to `prompt`, without EOS; `result(a, operator, b)` gives the digit written for each step."""
    value, steps = int(prompt[0]), []
    for operator, b in re.findall(r"([-+*])(\d)", prompt):
        steps.append(f"{value}{operator}{b}={result(value, operator, int(b))}")
        value = int(steps[-1][-1])
    return ",".join(steps)


def demonstrator(random: np.random.Generator):
    """A `result` for `solve` that holds the misconceptions."""
    return mistaken(random, misconceptions(), apply)


def mistaken(random: np.random.Generator, wrong: dict[tuple, int], apply: Callable[..., int]) -> Callable[..., int]:
    """`apply`, but for the facts in `wrong` most of the time."""

    def result(*fact) -> int:
        return wrong[fact] if fact in wrong and random.random() < MISCONCEPTION_RATE else apply(*fact)

    return result


def compute_score(data_source, solution_str, ground_truth, extra_info) -> float:
    """1.0 if the response (without EOS) is a complete chain of extra_info["steps"] steps that ends in the right digit.

    As in any outcome reward the steps themselves are not checked, so a wrong chain can be right by luck.
    """
    steps = solution_str.split(",")
    complete = len(steps) == extra_info["steps"] and all(STEP.fullmatch(step) for step in steps)
    return float(complete and steps[-1][-1] == str(ground_truth))


def step_labels(prompt: str, response: str) -> list[tuple[int, bool]]:
    """Where each step's result digit stands in the response (character = token), and whether the step is locally right.

    Right means the operation that the prompt asks for, on the previous step's written result, with its true result.
    Ends at the first text that is not a step.
    """
    value, labels, position = int(prompt[0]), [], 0
    for operator, b in re.findall(r"([-+*])(\d)", prompt):
        if not (step := STEP.match(response, position)):
            break
        labels.append((step.end() - 1, step.group() == f"{value}{operator}{b}={apply(value, operator, int(b))}"))
        value, position = int(step.group(4)), step.end() + 1
    return labels


def make_row(prompt: str, split: str, index: int, **extra) -> dict:
    answer = solve(prompt)
    extra_info = {"split": split, "index": index, "steps": answer.count("="), **extra}
    return verl_row("chain-arithmetic", prompt, answer[-1], extra_info)


def verl_row(source: str, prompt: str, ground_truth: str, extra_info: dict) -> dict:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
    }


def make_rows(chain: int, seed: int, sft_seed: int, sizes: tuple[int, int, int]) -> dict[str, list[dict]]:
    """{"train", "eval", "sft"}: rows of the verl shape, no prompt twice; sft rows have `extra_info.solution`.

    sizes: how many of each. seed: the prompts of train and eval. sft_seed: the demonstrations.
    """
    if sum(sizes) > 10 * 27**chain // 2:
        raise ValueError(f"there are not enough different chains of {chain} steps for {sum(sizes)} rows: raise --chain")
    return draw_rows(lambda random: problem(random, chain), solve, demonstrator, make_row, seed, sft_seed, sizes)


def draw_rows(
    problem: Callable[[np.random.Generator], str],
    solve: Callable[..., str],
    demonstrator: Callable[[np.random.Generator], Callable],
    make_row: Callable[..., dict],
    seed: int,
    sft_seed: int,
    sizes: tuple[int, int, int],
) -> dict[str, list[dict]]:
    """`make_rows` of any task that has these four functions, as they are here."""
    seen = set()

    def fresh(random, count):
        prompts = []
        while len(prompts) < count:
            prompt = problem(random)
            if prompt not in seen:
                seen.add(prompt)
                prompts.append(prompt)
        return prompts

    train, evaluation, demonstrations = sizes
    # Demonstrations first: one SFT model can then serve runs of several seeds.
    random = np.random.default_rng([sft_seed, DEMONSTRATIONS])
    shown, result = fresh(random, demonstrations), demonstrator(random)
    held_out = fresh(np.random.default_rng([seed, EVAL]), evaluation)
    prompts = fresh(np.random.default_rng([seed, TRAIN]), train)
    return {
        "train": [make_row(prompt, "train", i) for i, prompt in enumerate(prompts)],
        "eval": [make_row(prompt, "eval", i) for i, prompt in enumerate(held_out)],
        "sft": [make_row(prompt, "sft", i, solution=solve(prompt, result)) for i, prompt in enumerate(shown)],
    }


def write_model(path: Path, seed: int) -> None:
    """Writes a randomly initialised Qwen2 (645,632 float32 parameters) and its character tokenizer for transformers."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    # Qwen2's own tokenizer class with one token per character: AutoTokenizer takes that class for any Qwen2 model.
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=PAD, pad_token=PAD, eos_token=EOS)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = Qwen2Config(
        vocab_size=len(CHARACTERS),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,  # of 32: vLLM on a CPU has attention for few sizes
        num_key_value_heads=4,
        intermediate_size=384,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocabulary[EOS],
        pad_token_id=vocabulary[PAD],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def main() -> None:
    run(
        "python -m prime_fast.stages.quickstart",
        "Make the quickstart's task.",
        make_rows,
        chain=(6, "steps of a problem"),
    )


def run(program: str, description: str, make_rows: Callable, **size: tuple[int, str]) -> None:
    """The command line of a task: writes its rows and its untrained model.

    size: the one number that says how long a problem is, as name=(default, help); the first argument of make_rows.
    """
    (name, (default, meaning)), *_ = size.items()
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("out_dir", type=Path, help="gets model/, train.jsonl, eval.jsonl and sft.jsonl")
    parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--seed", type=int, default=0, help="of the problems to train and evaluate on")
    parser.add_argument(
        "--sft-seed", type=int, default=0, help="of the demonstrations and of the model's initial weights"
    )
    parser.add_argument("--train", type=int, default=8192, help="problems to train on")
    parser.add_argument("--eval", type=int, default=512, help="problems held out")
    parser.add_argument("--sft", type=int, default=400 * 64, help="demonstrations")
    arguments = parser.parse_args()
    if (length := getattr(arguments, name)) < 1:
        parser.error(f"--{name} must be at least 1")
    sizes = (arguments.train, arguments.eval, arguments.sft)
    try:
        rows = make_rows(length, arguments.seed, arguments.sft_seed, sizes)
    except ValueError as error:
        parser.error(str(error))
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    write_model(arguments.out_dir / "model", arguments.sft_seed)
    for name, split in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in split)
        (arguments.out_dir / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{arguments.out_dir}: {', '.join(f'{len(split)} {name}' for name, split in rows.items())} rows and a model")


if __name__ == "__main__":
    main()
