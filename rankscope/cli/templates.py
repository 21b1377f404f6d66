"""What `rankscope init NAME --type TYPE` writes: a commented study for each generic task, and for a user's own Trainer."""

from __future__ import annotations

_MODEL = "model: path/to/model # a folder of save_pretrained, or an id on the hub"
_FILES = ".jsonl, .json, .parquet or .csv, or an id on the hub"
_SPLIT = "# A column `split` (train, validation, test) is used; without one rows are split 70 / 15 / 15."
_OPTIONS = "# model_options: {quantization: 4bit, gradient_checkpointing: true}"
_HALF = "# dtype: bfloat16 # of the frozen weights; adapters are trained in float32"

# The lines of the section `task`, by type.
TASKS: dict[str, tuple[str, ...]] = {
    "sequence-classification": (
        "type: sequence-classification # a fresh head is trained beside the adapters",
        _MODEL,
        f"data: rows.csv # {_FILES}",
        "# Columns `text` and `label`, or `columns: {text: review, label: stars}`.",
        _SPLIT,
        "batch_size: 16",
        "max_length: 128 # tokens; longer texts are cut",
        _HALF,
    ),
    "causal-lm": (
        "type: causal-lm # every next token is learned; for answers only, `type: chat`",
        _MODEL,
        f"data: texts.jsonl # {_FILES}",
        "# A column `text`.",
        _SPLIT,
        "batch_size: 8",
        "max_length: 256 # tokens; longer texts are cut",
        _HALF,
        _OPTIONS,
    ),
    "chat": (
        "type: chat # the assistant's answers are learned",
        _MODEL,
        f"data: chats.jsonl # {_FILES}",
        '# A column `messages`: [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]; or `prompt` and',
        "# `completion`, or `columns: {prompt: instruction, completion: output}`.",
        _SPLIT,
        "batch_size: 8",
        "max_length: 1024 # tokens; a row whose question is longer is skipped",
        "# packing: true # several conversations to a sequence of `max_length`; then batch_size counts sequences",
        "# chat_template: template.jinja # in place of the tokenizer's",
        _HALF,
        _OPTIONS,
    ),
    "sequence-to-sequence": (
        "type: sequence-to-sequence # T5, BART and the like",
        _MODEL,
        f"data: pairs.jsonl # {_FILES}",
        "# Columns `source` and `target`.",
        _SPLIT,
        "batch_size: 8",
        "max_length: 256 # tokens of either text; longer ones are cut",
        _HALF,
    ),
    "token-classification": (
        "type: token-classification # a fresh head is trained beside the adapters",
        _MODEL,
        f"data: words.jsonl # {_FILES}",
        "# Columns `tokens` (a list of words) and `tags` (as many, as O, B-PER, I-PER).",
        _SPLIT,
        "batch_size: 16",
        "max_length: 256 # tokens; words after it are left out",
        _HALF,
    ),
    "image-classification": (
        "type: image-classification # a fresh head is trained beside the adapters",
        _MODEL,
        "data: images # a folder with a folder of images for each class, perhaps below train, validation and test;",
        "# or a file as of other tasks, with columns `image` (a path or bytes) and `label`",
        "batch_size: 16",
        "# max_skipped: 0.05 # share of images that may be unreadable",
        _HALF,
    ),
    "image-text-to-text": (
        "type: image-text-to-text # the answers are learned",
        _MODEL,
        f"data: rows.jsonl # {_FILES}",
        "# Columns `image` (paths or bytes), and `messages`, or `question` and `answer`.",
        _SPLIT,
        "# image_folder: images # where relative paths of images start",
        "batch_size: 4",
        "max_length: 1024 # tokens",
        _HALF,
        _OPTIONS,
    ),
}

_STUDY = """\
# A study of rankscope: `rankscope profile {name}.yaml` first. All keys: docs/study-keys.md, or `rankscope schema`.
# Relative paths start from this file's folder. Outputs go to out/{name}, by the file's name.
{task}
budget:
  uniform_rank: 8 # as many parameters as LoRA of rank 8 everywhere; or `parameters: 500000`
# targets: [q_proj, v_proj] # default: every linear module but the head
profile:
  n_batches: 32 # of an epoch; more tell signal and noise better apart
training:
  steps: 300{loop}
  learning_rate: [0.0001, 0.0003, 0.001] # tuned for every allocation, uniform included
search:
  n_trials: 60 # trainings in all; fewer than 30 seldom find more than one-shot gives
  fidelity: 0.5 # trials take half of the steps, finalists all of them
compare:
  methods: [uniform, one-shot, random]
  n_seeds: 5
"""

TRAINER = "trainer"
TYPES = (*TASKS, TRAINER)


def write_study(name: str, kind: str) -> str:
    """The text of a commented study of a type of task."""
    if kind == TRAINER:
        task = "task: train.py:make_trainer # def make_trainer(peft_config, seed): …; it returns a transformers or TRL Trainer"
        loop = " # warm-up, weight decay, clipping and batches are those of your Trainer's arguments"
    else:
        task, loop = "\n".join(["task:", *(f"  {line}" for line in TASKS[kind])]), ""
    return _STUDY.format(name=name, task=task, loop=loop)
