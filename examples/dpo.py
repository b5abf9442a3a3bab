"""Preference optimisation (DPO) with TRL: the base model under the adapter is its own reference.

    python examples/dpo.py                                                      # a tiny random model, seconds
    python examples/dpo.py --model meta-llama/Llama-3.2-1B-Instruct --data trl-lib/ultrafeedback_binarized

The data is a dataset of the Hub, or a .jsonl file, with the columns ``chosen`` and ``rejected`` (and ``prompt``).
"""

import common
import tiny
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from mos_ext.integrations.peft import MoSConfig


def main(argv: list[str] | None = None) -> None:
    options = common.arguments(__doc__, argv, "dpo-output", "a dataset of the Hub or a .jsonl file", (20, 1000))
    model = options.model or tiny.language_model(options.output / "base")
    data = common.dataset(options.data, tiny.preferences(64))

    adapter = MoSConfig(
        r=16 if options.model else 4,
        equivalent_rank=8 if options.model else 2,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    arguments = DPOConfig(
        output_dir=str(options.output / "run"),
        max_steps=options.steps,
        learning_rate=5e-5 if options.model else 5e-3,
        per_device_train_batch_size=4,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=options.model is not None,
    )
    # No second copy of the model: where the reference is asked for, the trainer switches the adapter off.
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=data, peft_config=adapter)
    trainer.train()
    trainer.model.print_trainable_parameters()
    trainer.save_model(str(options.output / "adapter"))
    AutoTokenizer.from_pretrained(model).save_pretrained(options.output / "adapter")
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    print(f"reward of the chosen answers over the rejected ones: {float(margins[-1]):.3f}, of the base model 0")


if __name__ == "__main__":
    main()
