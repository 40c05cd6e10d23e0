"""The shapes of rows people have, and each as a row of the verl / Eurus-2 shape.

verl      {"data_source", "prompt": [{"role", "content"}], "ability", "reward_model": {"ground_truth"}, "extra_info"}
trl       {"prompt": text or messages, ...} and no reward_model; the reward gets the columns by name
messages  {"messages": [...]}; an assistant's turn at their end is a worked solution, not a part of the prompt
alpaca    {"instruction", "input", "output"[, "system", "history"]}; instruction and input are joined by a line break
openrlhf  one of QUESTIONS, text or messages (DeepMath's question, GSM8K's, ...)

Messages, tools and reward_model may be JSON text, and content a list of {"type": "text", "text"} parts. All but verl
find their truth in the first of TRUTHS that is there, if any is, and gain `reward_model`; `extra_info.solution` if a
solution is worked out.
"""

import json
import re
from typing import Any

QUESTIONS = ("context_messages", "input", "question", "problem")
TRUTHS = ("ground_truth", "label", "answer", "final_answer", "solution")
COLUMNS = ("prompt", "data_source", "ability", "reward_model", "extra_info")
ADDED = "_added"  # key of a normalised row: those of its keys that its file does not have
WHERE = "_where"  # key of a loaded row: its file and line, in words
EXCERPT_CHARS = 60
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
NOT_TEXT = 'which a model of text cannot be given: leave such rows out with data.drop: ["broken"]'
ROLES = ("user", "assistant")
GSM8K_ANSWER = re.compile(r"\n####([^\n]*?)\s*\Z")  # ends a worked solution


def shape_of(row: dict) -> str | None:
    """None if there is no prompt to tell it by."""
    if "reward_model" in row:
        return "verl"
    keys = {"prompt": "trl", "messages": "messages", "instruction": "alpaca"} | dict.fromkeys(QUESTIONS, "openrlhf")
    return next((shape for key, shape in keys.items() if row.get(key)), None)


def normalise(row: Any, shape: str) -> dict:
    """The row with every key of COLUMNS, its prompt a text or a list of messages, and ADDED if it has more keys now.

    Raises ValueError, a sentence that lacks its subject, if a model of text cannot be asked this.
    """
    if not isinstance(row, dict):
        raise ValueError(f"is not an object but {type(row).__name__}")
    prompt, worked = _prompt(row, shape)
    _check_prompt(prompt)
    for key in MEDIA:
        if row.get(key) and (not isinstance(row[key], str) or "<image>" in str(prompt)):
            raise ValueError(f"has {key}, {NOT_TEXT}")
    truth = _reward_model(row) if shape == "verl" else _truth(row, shape, worked)
    made = dict.fromkeys(COLUMNS) | {"data_source": row.get("datasource")} | row | truth | {"prompt": prompt}
    added = [key for key in made if key not in row]
    return made | ({ADDED: added} if added or ADDED in row else {})


def decoded(value: Any) -> Any:
    """What JSON text of an object or array stands for; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def text_of(content: str | list[dict]) -> str:
    """The text of a message's content; parts are joined as they stand."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def prefill(row: dict) -> str:
    """The begun answer at the end of a row's prompt, which a response continues; "" where there is none."""
    prompt = row.get("prompt")
    last = prompt[-1] if isinstance(prompt, list) and prompt else {}
    return text_of(last["content"]) if last.get("role") == "assistant" and last.get("content") else ""


def named(row: dict, place: str) -> str:
    """A row, for people: where it stands (`place` if it does not say), what it is of and how it starts."""
    prompt = row.get("prompt")
    last = prompt[-1] if isinstance(prompt, list) and prompt else prompt
    text = " ".join(str(last.get("content") if isinstance(last, dict) else last).split())
    start = text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + "..."
    return f"{row.get(WHERE, place)} (data_source {row.get('data_source')}, prompt {start!r})"


def unfilled(row: dict) -> dict:
    """A row of a table without the nulls that filled its tools, calls and content parts up to common columns."""
    keys = [key for key in ("prompt", "messages", "context_messages", "tools") if isinstance(row.get(key), list)]
    return row | {key: [_unfilled(item, keep=("content",)) for item in row[key]] for key in keys}


def _unfilled(value: Any, keep: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {key: _unfilled(item) for key, item in value.items() if item is not None or key in keep}
    return [_unfilled(item) for item in value] if isinstance(value, list) else value


def _prompt(row: dict, shape: str) -> tuple[Any, Any]:
    """The prompt, and the worked solution that stands beside it."""
    if shape == "alpaca":
        return _alpaca(row), row.get("solution") or row.get("output")
    key = _prompt_key(row, shape)
    prompt, worked = row[key], row.get("solution")
    messages = decoded(prompt)
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
        prompt = messages
        if key == "messages" and messages[-1]["role"] == "assistant":
            _check_prompt(messages)
            *prompt, answer = messages
            worked = worked or text_of(answer.get("content") or "")
        if others := [name for name in QUESTIONS if shape == "messages" and row.get(name)]:
            _check_prompt(prompt)
            asked = [text_of(m.get("content") or "") for m in prompt if m["role"] == "user"][-1:]
            if different := [name for name in others if row[name] not in asked]:
                raise ValueError(f"has two prompts: {[key, *different]}")
    elif isinstance(prompt, str) and key in QUESTIONS:
        prompt = [{"role": "user", "content": prompt}]
    return prompt, worked


def _prompt_key(row: dict, shape: str) -> str:
    keys = {"verl": ("prompt", "messages"), "trl": ("prompt",), "messages": ("messages",)}.get(shape, QUESTIONS)
    found = [key for key in keys if row.get(key)]
    if not found:
        keys = keys if shape != "verl" or "reward_model" in row else ("prompt", "messages", "instruction", *QUESTIONS)
        raise ValueError(f"has no prompt in {', '.join(keys)}")
    if keys == QUESTIONS and any(row[key] != row[found[0]] for key in found):
        raise ValueError(f"has two prompts: {found}")
    return found[0]


def _alpaca(row: dict) -> list[dict]:
    asked = [row[key] for key in ("instruction", "input") if row.get(key)]
    if others := [key for key in QUESTIONS if key != "input" and row.get(key) and row[key] not in asked]:
        raise ValueError(f"has two prompts: {['instruction', *others]}")
    if not row.get("instruction") or not all(isinstance(text, str) for text in asked):
        raise ValueError("has no prompt: instruction, and input if there is one, must be texts")
    before = row.get("history") or []
    if not isinstance(before, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in before):
        raise ValueError("has a history that is no list of [instruction, output] pairs")
    said = [("system", row["system"])] if row.get("system") else []
    said += [pair for turn in before for pair in zip(ROLES, turn, strict=True)] + [("user", "\n".join(asked))]
    return [{"role": role, "content": text} for role, text in said]


def _check_prompt(prompt: Any) -> None:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            f'has a prompt that is no list of {{"role", "content"}} messages but {type(prompt).__name__} {prompt!r:.60}'
        )
    for part in (part for m in messages if isinstance(m.get("content"), list) for part in m["content"]):
        if part.get("type", "text") != "text":
            raise ValueError(f"has a part of type {part['type']!r:.60} in its prompt, {NOT_TEXT}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f'has a prompt with a part that is no {{"type": "text", "text"}} but {part!r:.60}')
    try:
        json.dumps(messages, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, RecursionError):
        raise ValueError("has a prompt that is not valid Unicode") from None


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, list):
        return bool(content) and all(isinstance(part, dict) for part in content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _reward_model(row: dict) -> dict:
    model = decoded(row.get("reward_model"))
    if not isinstance(model, dict | None):
        raise ValueError(f"has a reward_model that is no object but {model!r:.60}")
    return {"reward_model": model}


def _truth(row: dict, shape: str, worked: Any) -> dict:
    keys = (*TRUTHS, "output") if shape == "alpaca" else TRUTHS
    truth = next((row[key] for key in keys if row.get(key) not in (None, "")), None)
    if isinstance(truth, str) and (ending := GSM8K_ANSWER.search(truth)):
        truth, worked = ending.group(1).strip(), truth
    made = {"reward_model": {"style": "rule", "ground_truth": truth}} if any(key in row for key in keys) else {}
    return made | ({"extra_info": {"solution": worked}} if worked and not row.get("extra_info") else {})
