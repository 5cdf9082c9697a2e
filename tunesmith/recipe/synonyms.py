"""What other libraries call a recipe's keys: somebody who comes from one of them guesses by its names."""

from __future__ import annotations

from collections.abc import Mapping

_NAMES: Mapping[str, str] = {
    "name": "run_name experiment_name",
    "output": "output_dir output_path save_dir",
    "model.path": "model_name_or_path model_name model_path model_id base_model pretrained_model_name_or_path",
    "model.dtype": "torch_dtype",
    "model.revision": "model_revision",
    "method": "lora peft",
    "method.kind": "finetuning_type peft_type load_in_4bit quantization_bit quantization use_lora",
    "method.rank": "lora_rank lora_r r",
    "method.alpha": "lora_alpha",
    "method.dropout": "lora_dropout",
    "method.targets": "lora_target lora_targets lora_target_modules target_modules",
    "method.rslora": "use_rslora",
    "method.dora": "use_dora",
    "method.trainable": "freeze_trainable_layers freeze_trainable_modules unfrozen_parameters",
    "method.adapter": "adapter_name_or_path lora_model_dir",
    "data.train": "dataset datasets dataset_name dataset_path dataset_dir data_path train_file train_dataset",
    "data.validation": "eval_dataset val_dataset validation_dataset validation_file test_datasets",
    "data.validation_fraction": "val_size val_set_size test_size validation_split",
    "data.max_rows": "max_samples max_train_samples",
    "data.system": "system_prompt default_system",
    "data.chat_template": "template prompt_template",
    "data.max_length": "max_seq_length max_seq_len max_sequence_length cutoff_len sequence_len sequence_length "
    "seq_length seq_len model_max_length block_size context_length",
    "data.packing": "sample_packing neat_packing",
    "data.train_on": "train_on_inputs train_on_prompt assistant_only_loss completion_only_loss",
    "data.workers": "preprocessing_num_workers dataset_num_proc num_proc num_workers dataloader_num_workers",
    "train": "training trainer training_arguments",
    "train.epochs": "num_train_epochs num_epochs n_epochs max_epochs total_epochs",
    "train.max_steps": "max_train_steps train_steps total_steps num_steps max_iters",
    "train.micro_batch_tokens": "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size batch_size "
    "micro_batch_size train_batch_size device_batch_size",
    "train.accumulation": "gradient_accumulation_steps gradient_accumulation grad_accum grad_accumulation_steps "
    "accumulate_grad_batches accumulation_steps",
    "train.learning_rate": "lr peak_lr max_lr",
    "train.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type",
    "train.warmup_ratio": "warmup_steps num_warmup_steps lr_warmup_steps warmup",
    "train.min_learning_rate_ratio": "min_lr min_lr_ratio min_learning_rate",
    "train.optimizer": "optim optimizer_type",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.eps": "adam_epsilon",
    "train.max_grad_norm": "clip_grad grad_clip clip_grad_norm gradient_clip_val gradient_clipping",
    "train.precision": "bf16 fp16 mixed_precision",
    "train.checkpointing": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing "
    "enable_activation_checkpointing",
    "train.neftune_alpha": "neftune_noise_alpha",
    "train.seed": "random_seed data_seed",
    "parallel.tensor": "tensor_parallel tensor_parallel_size tensor_model_parallel_size tp",
    "parallel.pipeline": "pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size pp",
    "parallel.deepspeed_config": "deepspeed",
    "evaluation": "eval",
    "evaluation.every_steps": "eval_steps eval_every eval_interval eval_freq eval_strategy evaluation_strategy "
    "eval_every_n_steps evals_per_epoch val_check_interval",
    "checkpoint.every_steps": "save_steps save_every save_every_steps save_every_n_steps save_interval save_freq "
    "save_strategy saves_per_epoch checkpoint_every checkpoint_every_steps checkpoint_steps checkpoint_interval "
    "checkpointing_steps",
    "checkpoint.keep": "save_total_limit keep_last max_checkpoints keep_checkpoints",
    "log": "logging",
    "log.every_steps": "logging_steps log_steps log_every log_every_steps log_every_n_steps log_interval log_freq "
    "logging_interval logging_strategy",
    "log.trackers": "report_to loggers",
    "log.project": "wandb_project project_name",
}
_TOKENS = "it counts tokens, not rows"
_SHARE = "a share of the steps"
_NUMBER = "a number of steps"
_NOTES: Mapping[str, str] = {
    **dict.fromkeys(_NAMES["train.micro_batch_tokens"].split(), _TOKENS),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps", "lr_warmup_steps"), _SHARE),
    **dict.fromkeys(
        ("save_strategy", "saves_per_epoch", "eval_strategy", "evaluation_strategy", "evals_per_epoch",
         "logging_strategy"),
        _NUMBER,
    ),
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "quantization"), "qlora holds the model in 4 bits"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), "answers or all"),
    **dict.fromkeys(("min_lr", "min_learning_rate"), "a share of the peak"),
    **dict.fromkeys(("bf16", "fp16"), "bfloat16 or float16"),
    "val_size": "a share of the documents",
    "dataset_dir": "files or folders",
}  # fmt: skip
_OURS = {name: key for key, names in _NAMES.items() for name in names.split()}


def known_elsewhere(name: str) -> tuple[str, str] | None:
    """The recipe's dotted key (or section) that other libraries call `name`, and a word on its values.

    The word is empty where none is needed. None: no library that we know has a key of that name.
    """
    plain = name.lower().replace("-", "_")
    return (_OURS[plain], _NOTES.get(plain, "")) if plain in _OURS else None
