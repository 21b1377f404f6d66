"""MobileVLM's two stages at full size, on several GPUs with transformers' Trainer.

MobileVLM (Chu et al., arXiv 2312.16886) is CLIP ViT-L/14 at 336 px, a projector that leaves 144 of 576 tokens, and
MobileLLaMA-1.4B. Stage I trains the projector on LLaVA's 558 thousand captions, stage II the language model on its 665 thousand
instructions; here with LoRA, whose ranks rankscope places. The two study files hold the settings; `--dry-run` checks them
without weights and data:

    rankscope train studies/examples/mobile_vlm_full.yaml --dry-run

    python mobile_vlm_full.py assemble --vision openai/clip-vit-large-patch14-336 --language mtgv/MobileLLaMA-1.4B-Base start
    python mobile_vlm_full.py prepare blip_laion_cc_sbu_558k.json captions.parquet
    python mobile_vlm_full.py prepare llava_v1_5_mix665k.json instructions.parquet
    torchrun --nproc-per-node 8 mobile_vlm_full.py train mobile_vlm_stage1.yaml --model start stage1
    torchrun --nproc-per-node 8 mobile_vlm_full.py train mobile_vlm_full.yaml --model stage1 stage2

Stage I trains the parents of the study's targets in full. Stage II trains LoRA: of the allocation in `--allocation`, else
uniform; with `controller: {mode: on}`, ranks move within the budget. `python mobile_vlm_full.py config FOLDER` writes the
configuration that the dry run reads.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
)

import rankscope as rs
from rankscope.settings import StudySettings
from rankscope.tasks.mobile_vlm import MobileLlava

# CLIP ViT-L/14-336 as its model card has it; MobileLLaMA-1.4B: MobileVLM's paper, table 2, and its model card.
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "projection_dim": 768, "image_size": 336, "patch_size": 14}  # fmt: skip
LANGUAGE = {"vocab_size": 32064, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
            "num_attention_heads": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}  # fmt: skip
IMAGE_TOKEN = "<image>"  # the first after the vocabulary of 32,000, which is then filled up to a multiple of 64
CHAT = (  # of LLaVA-1.5, with the end of each answer that it was trained on
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
HELD_OUT = 1000  # images to validate, and as many to test


def write_config(folder: Path) -> None:
    """The configuration at full size."""
    vision, language = CLIPVisionConfig(**VISION), LlamaConfig(**LANGUAGE, dtype="bfloat16")
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=32000, dtype="bfloat16")
    config.architectures = [MobileLlava.__name__]
    config.save_pretrained(folder)


def assemble(vision: str, language: str, folder: Path) -> None:
    """A `MobileLlava` of a CLIP vision tower, a fresh projector and a language model, with its processor."""
    tower = CLIPVisionModel.from_pretrained(vision)
    decoder = AutoModelForCausalLM.from_pretrained(language)
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(vision_config=tower.config, text_config=decoder.config, image_token_index=image_token)
    torch.manual_seed(0)
    model = MobileLlava(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(vision)
    # The projector halves each side: as if patches were twice as large.
    sizes = {"patch_size": 2 * tower.config.patch_size, "num_additional_image_tokens": 1}
    strategy = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    LlavaProcessor(images, tokenizer, chat_template=CHAT, **sizes, **strategy).save_pretrained(folder)


def prepare(source: Path, target: Path, held_out: int = HELD_OUT) -> None:
    """LLaVA's JSON as Parquet with a column `split`: images are held out, not conversations about them."""
    rows = pd.DataFrame(json.loads(source.read_text(encoding="utf-8")))
    images = rows["image"].dropna().unique()
    chosen = np.random.default_rng(0).permutation(images)[: 2 * held_out]
    split = dict.fromkeys(chosen[:held_out], "validation") | dict.fromkeys(chosen[held_out:], "test")
    rows = rows.assign(split=rows["image"].map(split).fillna("train"))
    rows[["image", "conversations", "split"]].to_parquet(target)


def train(study: StudySettings, model: str, folder: Path, allocation: Path | None) -> None:
    """One stage, on as many processes as torchrun has started."""
    task = rs.load_task({**dict(study.task), "model": model}, base_dir=study.base_dir)
    network: Any = task.build_model()
    targets = rs.find_targets(network, study.targets)
    whole = all(target.tower == "projector" for target in targets)
    callbacks = []
    if whole:
        network.requires_grad_(False)
        for parent in {target.name.rpartition(".")[0] for target in targets}:
            network.get_submodule(parent).requires_grad_(True).float()
    else:
        network, callbacks = with_adapters(network, study, targets, allocation)
    settings, on_gpu = study.training, torch.cuda.is_available()
    trainer = Trainer(
        network,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.steps,
            per_device_train_batch_size=task.batch_size,
            gradient_accumulation_steps=max(
                1, settings.gradient_accumulation // int(os.environ.get("WORLD_SIZE", "1"))
            ),
            learning_rate=settings.peak_learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(settings.warmup_fraction * settings.steps),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=True,
            use_cpu=not on_gpu,
            dataloader_num_workers=4 if on_gpu else 0,
            ddp_find_unused_parameters=True,  # rows without an image use neither vision tower nor projector
            remove_unused_columns=False,
            label_names=["labels"],
            logging_steps=max(1, settings.steps // 100),
            save_steps=500,
            save_total_limit=1,
            report_to="none",
            seed=study.seed,
        ),
        train_dataset=task.dataset("train"),
        data_collator=task.collate,
        processing_class=task.processor,
        callbacks=callbacks,
    )
    for callback in callbacks:
        callback.bind(trainer)
    trainer.train()
    trainer.save_model(str(folder))
    trainer.accelerator.end_training()  # leaves the other processes


def with_adapters(network: Any, study: StudySettings, targets: Any, file: Path | None) -> tuple[Any, list[Any]]:
    """The model with LoRA of an allocation, or of uniform ranks, and the controller's callback if it is on."""
    training, budget = study.training, rs.ParameterBudget.from_settings(study.budget, targets)
    ranks = rs.RankAllocation.from_json(file) if file else rs.allocate("uniform", targets=targets, budget=budget)
    options = {"scaling": training.scaling, "lora_dropout": training.lora_dropout}
    if study.controller.mode != "on":
        return get_peft_model(network, ranks.to_lora_config(**options)), []
    room = rs.allocate(
        "uniform", targets=targets, budget=rs.ParameterBudget(2 * budget.limit)
    )  # masks move within these
    callback = rs.RankControllerCallback(budget=budget, settings=study.controller, start=ranks)
    return get_peft_model(network, room.to_lora_config(**options)), [callback]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("config").add_argument("folder", type=Path)
    parts = commands.add_parser("assemble")
    parts.add_argument("--vision", required=True)
    parts.add_argument("--language", required=True)
    parts.add_argument("folder", type=Path)
    rows = commands.add_parser("prepare")
    rows.add_argument("source", type=Path)
    rows.add_argument("target", type=Path)
    rows.add_argument("--held-out", type=int, default=HELD_OUT)
    stage = commands.add_parser("train")
    stage.add_argument("study", type=Path)
    stage.add_argument("folder", type=Path)
    stage.add_argument("--model", required=True)
    stage.add_argument("--allocation", type=Path)
    given = parser.parse_args()
    if given.command == "config":
        write_config(given.folder)
    elif given.command == "assemble":
        assemble(given.vision, given.language, given.folder)
    elif given.command == "prepare":
        prepare(given.source, given.target, given.held_out)
    else:
        train(rs.read_study(given.study), str(given.model), given.folder, given.allocation)


if __name__ == "__main__":
    main()
