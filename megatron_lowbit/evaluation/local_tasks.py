"""Two tasks for lm-evaluation-harness made of any text, so that there is a score without anybody's data set.

`local_cloze` is like LAMBADA (Paperno et al., 2016): the last word of a passage of a few sentences. `local_choice` is
like HellaSwag (Zellers et al., 2019): which of four sentences follows a passage; the other three stand elsewhere in
the text. No two passages of a task overlap, so its questions are as independent as the text lets them be. They come in
an order that the text's hash decides, as it decides everything that is drawn: the first N are a sample of the whole
text, and the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import ConfigError
from .prose import Sentence, sections

MOST = 2000  # questions, and sentences that wrong choices are drawn from
CONTEXT = 40  # words of a passage, at least
LONGEST = 120  # words of a passage, about
SENTENCE = (5, 40)  # words of one that is asked for
CHOICES = 4
NEAREST = 12  # wrong choices are drawn from so many, those nearest in length
FAR = 12  # sentences between the right choice and a wrong one, at least
LAST_WORD = re.compile(r"""(.*\w\S*) ([^\W\d_]{2,}(?:[-'’][^\W\d_]+)*) ?[.!?…]["'”’»)\]]*""")

TASKS = {
    "local_cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "target",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "target_delimiter": " ",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    },
}


def cloze(text: str) -> list[dict]:
    """{"context", "target"} of each question. The target is a word, and the space that divides it from the context."""
    found = []
    for before, _, sentence in _shuffled(list(_passages(text, _last_word)), text)[:MOST]:
        start, word = _last_word(sentence)
        found.append({"context": before + start, "target": f" {word}"})
    return found


def choice(text: str) -> list[dict]:
    """{"context", "choices", "label"} of each question. A space divides context and choice; `label` is the right one's
    place. All choices stand in the midst of paragraphs, and have about as many words."""
    everything = [sentence for section in sections(text) for sentence in section]
    pool = [(place, sentence.text) for place, sentence in enumerate(everything) if _choosable(sentence)]
    drawn, found = _random(text, "choices"), []
    pool = drawn.sample(pool, min(len(pool), MOST))
    for before, place, sentence in _shuffled(list(_passages(text, _choosable)), text)[:MOST]:
        words = len(sentence.text.split())
        shown = before.casefold() + sentence.text.casefold()
        far = {other for at, other in pool if abs(at - place) > FAR and other.casefold() not in shown}
        near = sorted(far, key=lambda other: (abs(len(other.split()) - words), other))[:NEAREST]
        if sentence.text in before or len(near) < NEAREST:
            continue
        choices, label = drawn.sample(near, CHOICES - 1), drawn.randrange(CHOICES)
        choices.insert(label, sentence.text)
        found.append({"context": before.rstrip(), "choices": choices, "label": label})
    return found


MAKERS = {"local_cloze": cloze, "local_choice": choice}


def write(text: str, names: list[str], folder: Path) -> dict[str, int]:
    """Write the tasks into a folder that lm_eval takes as include_path: a NAME.yaml and a NAME.jsonl each -> how many
    questions each has. Raises ConfigError for a text that has none."""
    counts = {}
    for name in names:
        questions = MAKERS[name](text)
        if not questions:
            raise ConfigError(
                f"the text has no question for {name}, which needs paragraphs of prose: sentences of words with spaces "
                f"between them, ending in . ! or ?, {CONTEXT} words and more in a row; give another text"
            )
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
        files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        task |= TASKS[name] | {"num_fewshot": 0, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(json.dumps(task, indent=1), encoding="utf-8")  # YAML holds all of JSON
        counts[name] = len(questions)
    return counts


def _passages(text: str, usable: Callable) -> Iterator[tuple[str, int, Sentence]]:
    """(what stands before a sentence, with the space between them; its number in the text; the sentence) of sentences
    that are `usable`, with enough before them that no other passage has."""
    place = -1
    for section in sections(text):
        passage: list[str] = []  # each with what divides it from the one before
        for sentence in section:
            place += 1
            divider = "" if not passage else "\n\n" if sentence.opens else " "
            if sum(len(each.split()) for each in passage) >= CONTEXT and usable(sentence):
                yield "".join(passage).lstrip() + divider, place, sentence
                passage = []
                continue
            passage.append(divider + sentence.text)
            while len(passage) > 1 and sum(len(each.split()) for each in passage) > LONGEST:
                passage.pop(0)


def _last_word(sentence: Sentence) -> tuple[str, str] | None:
    """(what stands before it, the last word); None if the sentence ends otherwise, or repeats the word."""
    match = LAST_WORD.fullmatch(sentence.text)
    if match is None or len(sentence.text.split()) < SENTENCE[0]:
        return None
    before, word = match.groups()
    return None if before.casefold().endswith(word.casefold()) else (before, word)


def _choosable(sentence: Sentence) -> bool:
    return not sentence.opens and SENTENCE[0] <= len(sentence.text.split()) <= SENTENCE[1]


def _shuffled(passages: list, text: str) -> list:
    _random(text, "order").shuffle(passages)
    return passages


def _random(text: str, purpose: str) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(f"{purpose}\n{text}".encode()).digest(), "big"))
