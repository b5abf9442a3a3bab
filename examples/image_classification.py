"""Image classification: a vision transformer learns new classes; its new head is trained and saved beside the pools.

    python examples/image_classification.py                                     # a tiny random model, seconds
    python examples/image_classification.py --model google/vit-base-patch16-224-in21k --data beans

The data is a dataset of the Hub with a column of images and one of class labels.
"""

import common
import numpy as np
import tiny
import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from mos_ext.integrations.peft import MoSConfig


def main(argv: list[str] | None = None) -> None:
    options = common.arguments(__doc__, argv, "image-output", "a dataset of the Hub; images", (30, 500))
    name = options.model or tiny.vision_model(options.output / "base")
    data = load_dataset(options.data or "beans") if options.model else tiny.images(96)
    test = next(split for split in ("validation", "test") if split in data)
    label = next(column for column, feature in data["train"].features.items() if hasattr(feature, "names"))
    image = next(column for column, feature in data["train"].features.items() if type(feature).__name__ == "Image")
    classes = data["train"].features[label].names

    processor = AutoImageProcessor.from_pretrained(name)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        pixels = processor([row[image].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row[label] for row in rows])}

    def load_base() -> torch.nn.Module:
        return AutoModelForImageClassification.from_pretrained(
            name, num_labels=len(classes), ignore_mismatched_sizes=True
        )

    config = MoSConfig(
        r=16 if options.model else 4,
        equivalent_rank=4 if options.model else 2,
        target_modules="all-linear",
        modules_to_save=["classifier"],
    )
    model = get_peft_model(load_base(), config)
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        str(options.output / "run"),
        max_steps=options.steps,
        learning_rate=2e-3 if options.model else 1e-2,
        per_device_train_batch_size=16,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )

    def accuracy(predictions) -> dict[str, float]:
        return {"accuracy": float(np.mean(predictions.predictions.argmax(-1) == predictions.label_ids))}

    trainer = Trainer(
        model, arguments, collate, train_dataset=data["train"], eval_dataset=data[test], compute_metrics=accuracy
    )
    trainer.train()
    print(f"accuracy of {len(data[test])} images: {trainer.evaluate()['eval_accuracy']:.2f}")
    model.save_pretrained(options.output / "adapter")
    loaded = PeftModel.from_pretrained(load_base(), options.output / "adapter").eval()
    with torch.no_grad():
        batch = collate([data[test][0]])
        print(f"the first of them, loaded again: {classes[loaded(batch['pixel_values']).logits.argmax().item()]}")


if __name__ == "__main__":
    main()
