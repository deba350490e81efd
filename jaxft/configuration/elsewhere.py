"""The names that PEFT, TRL and transformers have for what a recipe sets, and what to write here instead."""

from __future__ import annotations

import shlex

from jaxft.errors import LONGEST

ADAPTER = "--config configs/sft.py:lora (any row of jaxft/methods.py) for an adapter, configs/sft.py:full for none"
ALONE = "nothing (it is always so here)"
NONE = "nothing (there is none here)"
GOES_ON = "nothing (the same command on the same --workdir goes on by itself)"

# {their name: (our key, a value as an example)}: the value stays what it is.
RENAMED: dict[str, tuple[str, str]] = {
    "r": ("method.rank", "16"),
    "lora_r": ("method.rank", "16"),
    "lora_rank": ("method.rank", "16"),
    "lora_alpha": ("method.alpha", "32"),
    "lora_dropout": ("method.dropout", "0.05"),
    "vera_dropout": ("method.dropout", "0.05"),
    "target_modules": ("method.targets", "q_proj,v_proj"),
    "lora_target_modules": ("method.targets", "q_proj,v_proj"),
    "lora_target": ("method.targets", "q_proj,v_proj"),
    "use_rslora": ("method.rank_stabilized", "True"),
    "init_lora_weights": ("method.init", "pissa"),
    "loraplus_lr_ratio": ("method.ratio", "16"),
    "ensure_weight_tying": ("method.tie_adapters", "True"),
    "gradient_accumulation_steps": ("grad_accum", "4"),
    "per_device_eval_batch_size": ("eval_batch_size", "8"),
    "train_batch_size": ("batch_size", "8"),
    "num_train_epochs": ("epochs", "3"),
    "num_epochs": ("epochs", "3"),
    "max_steps": ("steps", "1000"),
    "max_seq_length": ("data.max_length", "1024"),
    "max_seq_len": ("data.max_length", "1024"),
    "sequence_len": ("data.max_length", "1024"),
    "cutoff_len": ("data.max_length", "1024"),
    "model_max_length": ("data.max_length", "1024"),
    "lr": ("optimizer.learning_rate", "2e-4"),
    "lr_scheduler_type": ("optimizer.schedule", "cosine"),
    "lr_scheduler": ("optimizer.schedule", "cosine"),
    "num_warmup_steps": ("optimizer.warmup_steps", "100"),
    "max_grad_norm": ("optimizer.clip_norm", "1.0"),
    "gradient_clipping": ("optimizer.clip_norm", "1.0"),
    "adam_beta1": ("optimizer.b1", "0.9"),
    "adam_beta2": ("optimizer.b2", "0.999"),
    "beta1": ("optimizer.b1", "0.9"),
    "beta2": ("optimizer.b2", "0.999"),
    "adam_epsilon": ("optimizer.epsilon", "1e-8"),
    "eps": ("optimizer.epsilon", "1e-8"),
    "optim": ("optimizer.name", "adamw"),
    "logging_steps": ("log_every", "10"),
    "save_steps": ("checkpoint.every", "500"),
    "eval_steps": ("eval_every", "500"),
    "save_total_limit": ("checkpoint.keep", "2"),
    "load_best_model_at_end": ("checkpoint.best", "True"),
    "early_stopping_patience": ("patience", "3"),
    "sample_packing": ("data.packing", "True"),
    "tokenizer_name": ("tokenizer", "path/to/tokenizer"),
    "tokenizer_name_or_path": ("tokenizer", "path/to/tokenizer"),
    "chat_template_path": ("data.chat_template", "template.jinja"),
    "train_file": ("data.train", "train.jsonl"),
    "train_dataset": ("data.train", "train.jsonl"),
    "eval_file": ("data.eval", "heldout.jsonl"),
    "validation_file": ("data.eval", "heldout.jsonl"),
    "eval_dataset": ("data.eval", "heldout.jsonl"),
    "data_seed": ("seed", "42"),
    "bnb_4bit_quant_type": ("base.quantize", "nf4"),
    "bnb_4bit_use_double_quant": ("base.double_quant", "True"),
    "adapter_name_or_path": ("adapter", "runs/first/adapter"),
    "report": ("report_to", "tensorboard"),
    "torch_dtype": ("dtype", "bfloat16"),
    "label_smoothing_factor": ("objective.label_smoothing", "0.1"),
    "precompute_ref_log_probs": ("objective.precompute", "True"),
    "loss_type": ("objective.name", "dpo"),
    "rpo_alpha": ("objective.sft_weight", "1.0"),
    "f_divergence_type": ("objective.f_divergence", "reverse_kl"),
    "ref_model": ("objective.reference", "path/to/model"),
    "ref_model_sync_steps": ("objective.reference_every", "512"),
    "ref_model_mixup_alpha": ("objective.reference_mix", "0.6"),
}
# {their name: what to write}, where the value is another.
SAID: dict[str, str] = {
    "modules_to_save": (
        """--config.method.train_also=PATTERNS of the leaves that train besides the adapter, """
        """as '("head","embed")' or '("*_norm",)'"""
    ),
    "bias": """--config.method.train_also='("*bias",)' for the biases too""",
    "use_dora": "--config=configs/sft.py:dora",
    "use_peft": ADAPTER,
    "peft_type": ADAPTER,
    "finetuning_type": ADAPTER,
    "task_type": ALONE,
    "fan_in_fan_out": ALONE,
    "per_device_train_batch_size": (
        "--config.batch_size=N, the sequences of a whole update: theirs, times the devices, times the parts that "
        "--config.grad_accum takes one after the other"
    ),
    "micro_batch_size": (
        "--config.batch_size=N, the sequences of a whole update, and --config.grad_accum=PARTS"
    ),
    "warmup_ratio": "--config.optimizer.warmup_steps=N, in updates and not as a share of them",
    "bf16": "--config.dtype=bfloat16 (and --config.param_dtype=bfloat16 keeps the weights in it)",
    "fp16": "--config.dtype=float16 (and --config.param_dtype=float16 keeps the weights in it)",
    "gradient_checkpointing": "--config.remat=full, or outputs or dots, which keep more",
    "use_gradient_checkpointing": "--config.remat=full, or outputs or dots, which keep more",
    "load_in_4bit": "--config.base.quantize=nf4, or --config=configs/sft.py:qlora",
    "load_in_8bit": "--config.base.quantize=int8",
    "use_qlora": "--config=configs/sft.py:qlora",
    "output_dir": "--workdir RUN",
    "logging_dir": "--workdir RUN, in which metrics.jsonl and plots/ stand",
    "resume_from_checkpoint": GOES_ON,
    "overwrite_output_dir": f"{GOES_ON}; another run takes another --workdir",
    "model_name_or_path": "--config.model=DIR, a folder with config.json and *.safetensors",
    "pretrained_model_name_or_path": "--config.model=DIR, a folder with config.json and *.safetensors",
    "dataset_name": "--config.data.train=FILE, as train.jsonl (or tfds:NAME)",
    "dataset": "--config.data.train=FILE, as train.jsonl (or tfds:NAME)",
    "dataset_path": "--config.data.train=FILE, as train.jsonl (or tfds:NAME)",
    "dataset_text_field": "--config.data.fields.text=KEY, the key of the texts in the data",
    "assistant_only_loss": "--config.data.loss_on=completion (the default), or all",
    "completion_only_loss": "--config.data.loss_on=completion (the default), or all",
    "train_on_inputs": "--config.data.loss_on=all",
    "val_set_size": "--config.data.eval=FILE of held-out rows",
    "eval_strategy": "--config.data.eval=FILE and --config.eval_every=N updates",
    "evaluation_strategy": "--config.data.eval=FILE and --config.eval_every=N updates",
    "save_strategy": "--config.checkpoint.every=N updates",
    "metric_for_best_model": "--config.checkpoint.best=True, by the held-out loss",
    "beta": "--config.objective.beta=0.1, of the recipes configs/dpo.py:METHOD",
    "deepspeed": "--config.mesh.fsdp=N devices among which the weights are divided",
    "fsdp_config": "--config.mesh.fsdp=N devices among which the weights are divided",
    "push_to_hub": f"{NONE}: jaxft push --folder RUN/adapter --repository OWNER/NAME uploads it",
    "hub_model_id": f"{NONE}: jaxft push --folder RUN/adapter --repository OWNER/NAME uploads it",
    "trust_remote_code": f"{NONE}: code that comes with a model is never run",
    "attn_implementation": ALONE,
    "use_flash_attention_2": ALONE,
    "group_by_length": "--config.data.packing=True fills the rows instead",
    "neftune_noise_alpha": NONE,
    "dataloader_num_workers": ALONE,
    "dataset_num_proc": ALONE,
    "remove_unused_columns": ALONE,
    "max_prompt_length": "--config.data.max_length=N of prompt and completion together",
    "max_completion_length": "--config.data.max_length=N of prompt and completion together",
    "device_map": "--config.mesh.fsdp=N devices, or --config.mesh.tensor=N",
    "tensor_parallel_size": "--config.mesh.tensor=N devices",
}


def told(name: str, value: str = "") -> str:
    """What to write for a name of PEFT's, TRL's or transformers'; "" for a name that is none of theirs.

    >>> told("lora_r", "8"), told("optim", "adamw_torch"), told("config.train.output-dir")
    ('--config.method.rank=8', '--config.optimizer.name=adamw', '--workdir RUN')
    """
    last = name.split(".")[-1].lower().replace("-", "_")
    if len(name) > LONGEST or (last not in RENAMED and last not in SAID):
        return ""
    if last in SAID:
        return SAID[last]
    key, example = RENAMED[last]
    ours, comma, behind = VALUES.get(key, {}).get(value.lower(), "").partition(",")
    return f"--config.{key}={shlex.quote(ours or value or example)}{comma}{behind}"


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
# {key: {their value: what to write}}.
VALUES: dict[str, dict[str, str]] = {
    "objective.name": {"sigmoid": "dpo", "kto_pair": "kto", "reward": "dpo"},
    "base.quantize": {"4bit": "nf4", "8bit": "int8", "bnb": "nf4", "true": "nf4"},
    "remat": {"true": "full", "false": "none"},
    "optimizer.schedule": {
        "constant_with_warmup": "constant, with optimizer.warmup_steps",
        "cosine_with_min_lr": "cosine, with optimizer.final_fraction",
        "warmup_stable_decay": "wsd",
    },
    "optimizer.name": {
        **dict.fromkeys(
            ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_8bit", "paged_adamw_8bit"),
            "adamw",
        ),
    },
    "dtype": DTYPES,
    "param_dtype": DTYPES,
    "method.dtype": DTYPES,
}


def told_value(key: str, value: object) -> str:
    """What to write for another library's value of a key, ready to end a message; "" where there is nothing to say.

    >>> told_value("dtype", "bf16")
    ': write bfloat16'
    """
    ours = VALUES.get(key, {}).get(str(value).lower())
    return f": write {ours}" if ours else ""
