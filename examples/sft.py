"""Supervised fine-tuning with TRL: a chat model learns from conversations, in an adapter of a few megabytes.

    python examples/sft.py                                                      # a tiny random model, seconds
    python examples/sft.py --model meta-llama/Llama-3.2-1B-Instruct --data trl-lib/Capybara

The data is a dataset of the Hub, or a .jsonl file, with a column of ``messages`` (or ``text``, or ``prompt`` and
``completion``: whatever TRL takes).
"""

import common
import tiny
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from mos_ext.integrations.peft import MoSConfig


def main(argv: list[str] | None = None) -> None:
    options = common.arguments(__doc__, argv, "sft-output", "a dataset of the Hub or a .jsonl file", (20, 1000))
    model = options.model or tiny.language_model(options.output / "base")
    data = common.dataset(options.data, tiny.conversations(64))

    # The parameters of LoRA of rank 8 (of 2 for the tiny model, whose 4 layers share less), at rank 16.
    adapter = MoSConfig(
        r=16 if options.model else 4,
        equivalent_rank=8 if options.model else 2,
        dropout=0.05,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    arguments = SFTConfig(
        output_dir=str(options.output / "run"),
        max_steps=options.steps,
        learning_rate=2e-4 if options.model else 1e-2,
        per_device_train_batch_size=4,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=options.model is not None,
    )
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, peft_config=adapter)
    trainer.train()
    trainer.model.print_trainable_parameters()
    trainer.save_model(str(options.output / "adapter"))
    AutoTokenizer.from_pretrained(model).save_pretrained(options.output / "adapter")

    # What was saved is a PEFT adapter like any other, once mos_ext.integrations.peft is imported.
    tokenizer = AutoTokenizer.from_pretrained(options.output / "adapter")
    tuned = AutoPeftModelForCausalLM.from_pretrained(options.output / "adapter").eval()
    question = [{"role": "user", "content": "I have 2 plums and buy 3 more. How many plums do I have?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = tuned.generate(**prompt, max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
