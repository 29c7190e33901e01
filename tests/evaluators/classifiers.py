"""Tiny encoders, experts with a head each, and data to classify."""

import json

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(40))]
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.5,
}
BERT = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 24}
LLAMA = {**BERT, "vocab_size": len(WORDS) + 1, "pad_token_id": len(WORDS)}
"""A decoder that takes another token for padding than its tokenizer does."""
IMAGE = {**SMALL, "image_size": 8, "patch_size": 4}
CLASSES = {"first": 3, "second": 4}
NAMES = {"first": ("red", "green", "blue")}


def save_tokenizer(folder):
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=24,
    ).save_pretrained(folder)


def save_processor(folder):
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)


def _labels(expert):
    names = NAMES.get(expert, [f"LABEL_{i}" for i in range(CLASSES[expert])])
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def make_experts(root, kind="bert"):
    """Save an encoder without a head, and two classifiers with heads of different sizes."""
    config, encoder, classifier, save = {
        "bert": (
            lambda **own: BertConfig(**BERT, **own),
            BertModel,
            BertForSequenceClassification,
            save_tokenizer,
        ),
        "vit": (
            lambda **own: ViTConfig(**IMAGE, **own),
            lambda config: ViTModel(config, add_pooling_layer=False),
            ViTForImageClassification,
            save_processor,
        ),
        "llama": (
            lambda **own: LlamaConfig(**LLAMA, **own),
            LlamaModel,
            LlamaForSequenceClassification,
            save_tokenizer,
        ),
    }[kind]
    torch.manual_seed(0)
    base = encoder(config())
    base.save_pretrained(root / "base")
    save(root / "base")
    for i, expert in enumerate(CLASSES):
        torch.manual_seed(i + 1)
        model = classifier(config(**_labels(expert)))
        inner = getattr(model, model.base_model_prefix)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                own = inner.get_parameter(name)
                own.copy_(parameter + 0.1 * torch.randn(parameter.shape))
        model.save_pretrained(root / expert)
        save(root / expert)


def make_pooled_experts(root, kind="bert"):
    """Save an encoder, and two of the same with a linear layer beside their own tensors."""
    if kind == "bert":
        made, save = (lambda: BertModel(BertConfig(**BERT))), save_tokenizer
    else:
        config = {name: value for name, value in IMAGE.items() if name != "initializer_range"}
        made, save = (lambda: CLIPVisionModel(CLIPVisionConfig(**config))), save_processor
    torch.manual_seed(0)
    made().save_pretrained(root / "base")
    save(root / "base")
    for expert, n_classes in CLASSES.items():
        made().save_pretrained(root / expert)
        save(root / expert)
        file = root / expert / "model.safetensors"
        head = {
            "classifier.weight": torch.randn(n_classes, 16),
            "classifier.bias": torch.randn(n_classes),
        }
        save_file({**load_file(file), **head}, file, metadata={"format": "pt"})


TOWER = [r"^text_model\.", "_projection", "logit_scale"]
"""What a CLIP model has and its image classifiers do not."""


def make_clip_experts(root):
    """Save a CLIP model of images and texts, and two image classifiers on its vision tower."""
    small = {name: value for name, value in SMALL.items() if name != "initializer_range"}
    text = {**small, "vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 3}
    image = {**small, "image_size": 8, "patch_size": 4}

    def config(**own):
        return CLIPConfig(text_config=text, vision_config=image, projection_dim=16, **own)

    torch.manual_seed(0)
    base = CLIPModel(config())
    base.save_pretrained(root / "base")
    save_processor(root / "base")
    tower = dict(base.named_parameters())
    for expert in CLASSES:
        model = CLIPForImageClassification(config(**_labels(expert)))
        with torch.no_grad():
            for name, own in model.named_parameters():
                noise = torch.randn(own.shape)
                own.copy_(tower[name] + 0.1 * noise if name in tower else noise)
        model.save_pretrained(root / expert)
        save_processor(root / expert)


def texts(n=24):
    """Return texts of different lengths; the last is longer than the window."""
    rows = [" ".join(f"w{(7 * i + j) % 40}" for j in range(1 + (5 * i) % 13)) for i in range(n)]
    return [*rows[:-1], " ".join(f"w{j % 40}" for j in range(40))]


def write_texts(root, n=24):
    """Write a file per expert: the first's labels are names, the second's are numbers."""
    (root / "data").mkdir(exist_ok=True)
    for expert, n_classes in CLASSES.items():
        names = NAMES.get(expert, range(n_classes))
        rows = [{"text": t, "label": names[i % n_classes]} for i, t in enumerate(texts(n))]
        file = root / "data" / f"{expert}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_images(root, n_each=6):
    """Write a folder of images per expert, by split and by class."""
    for expert, n_classes in CLASSES.items():
        names = NAMES.get(expert, [f"c{i}" for i in range(n_classes)])
        for k, name in enumerate(names):
            folder = root / "data" / expert / "test" / str(name)
            folder.mkdir(parents=True)
            for i in range(n_each):
                noise = torch.Generator().manual_seed(100 * k + i)
                pixels = torch.randint(0, 255, (10, 12, 3), generator=noise, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")


def write_study(root, tasks, **changes):
    """Write a study of the two experts, one task each, and return its file."""
    study = {
        "base": "base",
        "experts": {expert: expert for expert in CLASSES},
        "space": {"method": "task_arithmetic", "coefficient": {"low": 0.0, "high": 1.0}},
        "tasks": tasks,
        "objective": "mean",
        "search": {"sampler": "random", "n_trials": 5, "round_blocks": 2},
        "confirm": {"top_k": 1, "n_resamples": 100},
    }
    file = root / "study.yaml"
    file.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False))
    return file


def text_tasks(**changes):
    return {
        expert: {
            "evaluator": "classification",
            "expert": expert,
            "data": f"data/{expert}.jsonl",
            "text": "text",
            "select": 12,
            "hold_out": 12,
            **changes,
        }
        for expert in CLASSES
    }


def image_tasks(**changes):
    return {
        expert: {
            "evaluator": "classification",
            "expert": expert,
            "data": f"data/{expert}",
            "split": "test",
            "image": "image",
            "select": 9,
            "hold_out": 9,
            **changes,
        }
        for expert in CLASSES
    }
