"""LLaMA-Factory's keys: which are the same here, which have no effect on what is learned, which cannot be honoured."""

from __future__ import annotations

from typing import Any

from smidgen.drafts import Place

# key -> (place in the recipe, LLaMA-Factory's default); the meaning is the same on both sides.
SAME: dict[str, tuple[Place, Any]] = {
    "model_name_or_path": (("model",), None),
    "output_dir": (("output",), None),
    "seed": (("seed",), 42),
    "cutoff_len": (("data", "max_length"), 2048),
    "max_samples": (("data", "limit"), None),
    "default_system": (("data", "system"), None),
    "learning_rate": (("train", "learning_rate"), 5e-5),
    "num_train_epochs": (("train", "epochs"), 3.0),
    "lr_scheduler_type": (("train", "lr_scheduler_type"), "linear"),
    "weight_decay": (("train", "weight_decay"), 0.0),
    "max_grad_norm": (("train", "max_grad_norm"), 1.0),
    "logging_steps": (("train", "logging_steps"), 500),
    "save_total_limit": (("train", "save_total_limit"), None),
    "optim": (("train", "optim"), None),
    "loraplus_lr_ratio": (("train", "loraplus_lr_ratio"), None),
    "loraplus_lr_embedding": (("train", "loraplus_lr_embedding"), None),
}

# Keys that change nothing in what is learned, and why they have no effect here.
NO_EFFECT: dict[str, str] = dict.fromkeys(
    ("preprocessing_num_workers", "preprocessing_batch_size", "dataloader_num_workers", "dataloader_pin_memory"),
    "reading and tokenising need no workers here",
) | {
    "trust_remote_code": "code in a model's folder is never run; the architecture must be one that transformers has",
    "do_train": "'smidgen train' trains",
    "do_eval": "held-out rows are evaluated wherever there are any",
    "do_predict": "use 'smidgen evaluate' after the training",
    "predict_with_generate": "use 'smidgen evaluate' after the training",
    "compute_accuracy": "use 'smidgen evaluate' after the training",
    "overwrite_cache": "cached tokens are found by their content, so they are never stale",
    "tokenized_path": "cached tokens are found by their content",
    "overwrite_output_dir": "what happens to an earlier run in the folder is asked on the command line",
    "plot_loss": "report.html always shows the loss",
    "save_only_model": "checkpoints always hold what resuming needs",
    "save_safetensors": "nothing but safetensors is written",
    "per_device_eval_batch_size": "micro-batches are cut by tokens; the result is the same",
    "eval_on_start": "the loss without the adapter is always measured",
    "streaming": "rows are read from a cache on disk, whatever their number",
    "buffer_size": "every epoch is shuffled as a whole",
    "flash_attn": "attention is chosen by what the machine has",
    "use_fast_tokenizer": "tokenizers are the fast ones",
    "low_cpu_mem_usage": "weights are always mapped from disk",
    "use_reentrant_gc": "changes the speed alone",
    "enable_liger_kernel": "changes the speed alone; smidgen brings its own kernels",
    "use_unsloth": "changes the speed alone; smidgen brings its own kernels",
    "use_unsloth_gc": "changes the memory alone; see 'train.gradient_checkpointing'",
    "use_v1_kernels": "changes the speed alone; smidgen brings its own kernels",
    "torch_compile": "changes the speed alone",
    "group_by_length": "micro-batches are always cut by length",
    "ignore_pad_token_for_loss": "padding never counts in the loss",
    "deepspeed": "write 'fsdp: full_shard' in 'train' of a recipe of smidgen's own, and start it with --processes",
    "fsdp": "write 'fsdp: full_shard' in 'train' of a recipe of smidgen's own, and start it with --processes",
    "fsdp_config": "write 'fsdp: full_shard' in 'train' of a recipe of smidgen's own, and start it with --processes",
    "push_to_hub": "nothing is uploaded",
    "cache_dir": "set the environment variable HF_HOME",
    "hf_hub_token": "set the environment variable HF_TOKEN, and take the secret out of the file",
    "tool_format": "tool calls are written by the chat template",
    "infer_dtype": "matters to inference alone",
    "infer_backend": "matters to inference alone",
    "use_kv_cache": "matters to inference alone",
    "max_length": "matters to inference alone; see 'cutoff_len'",
    "run_name": "a run is named by its folder",
    "logging_dir": "logs stand in the run folder",
    "media_dir": "only text is read",
    "print_param_status": "'smidgen check' lists what is trained",
}

# What these begin with belongs to a switch, which is judged by itself, or changes nothing in what is learned.
NO_EFFECT_PREFIXES = tuple(
    """
    accelerator_config activation_checkpointing adapter_folder apollo_ asft_ audio_ auto_find_batch_size
    average_tokens_across_devices badam_ batch_eval_metrics bf16_full_eval bnb_ crop_to_patches
    data_shared_file_system dataloader_ ddp_ debug disable_tqdm do_sample dpo_ eaft_
    enable_jit_checkpoint enable_torch_profiler eval_accumulation_steps eval_delay eval_do_concat eval_num_beams
    eval_use_gather export_ fp16_full_eval fp8_ freeze_multi_modal_ freeze_vision_ full_determinism galore_
    generation_ gradient_checkpointing_ greater_is_ hub_ hyper_parallel_ image_ include_ init_special_ kt_ kto_
    label_names ld_alpha length_ liger_ local_rank log_ logging_ master_ max_new_tokens
    metric_for_ module_dropout ms_hub_ num_beams offload_folder oft_ om_hub_ parallelism_config ppo_
    prediction_loss_only pref_ profile_ profiler_ project quantization_device_map ray_ ref_model remove_unused_columns
    repetition_ restore_callback_ reward_model save_on_each_node sglang_ simpo_ skip_memory_metrics
    skip_special_tokens sortish_sampler swanlab_ temperature tf32 top_k top_p torch_compile_ torch_empty_ trackio_
    use_audio_in_video use_cache use_cpu use_liger_kernel video_ vllm_
    """.split()
)

LATER = "smidgen does not have it yet"
# Keys that change what is learned and cannot be honoured -> (the values that switch them off, why or what to do).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_name_or_path": ((), "training on from an adapter is not there yet; merge it, then train the merged model"),
    "resume_from_checkpoint": ((False,), "to go on with an interrupted run use 'smidgen train FILE --resume'"),
    "mask_history": ((False,), "every assistant turn counts in the loss; split the chats to train on their last turns"),
    "mix_strategy": (("concat",), "files are joined; for a mixture write a smidgen recipe with a weight for each file"),
    "interleave_probs": ((), "files are joined; for a mixture write a smidgen recipe with a weight for each file"),
    "enable_thinking": ((True,), "the chat template says what becomes of thoughts; give another as 'data.template'"),
    "model_revision": (("main",), "download the revision, and give its folder as the model"),
    "data_seed": ((), "the one 'seed' orders the rows too"),
    "lr_scheduler_kwargs": (({},), LATER),
    "adam_beta1": ((0.9,), "AdamW's betas are 0.9 and 0.999"),
    "adam_beta2": ((0.999,), "AdamW's betas are 0.9 and 0.999"),
    "adam_epsilon": ((1e-8,), "AdamW's epsilon is 1e-8"),
    "train_sampling_strategy": (("random",), LATER),
    "freeze_trainable_modules": (("all",), "whole layers are trained"),
}
_SWITCHES = """
    create_new_adapter dataloader_drop_last disable_shuffling early_stopping_steps
    eval_on_each_dataset fp8 freeze_extra_modules freeze_language_model ignore_data_skip label_smoothing_factor
    load_best_model_at_end mixture_of_depths moe_aux_loss_coef neftune_noise_alpha
    new_special_tokens_config optim_args optim_target_modules pissa_convert preserve_thinking
    rope_scaling shift_attn split_special_tokens train_from_scratch upcast_layernorm upcast_lmhead_output
    use_adam_mini use_apollo use_asft_loss use_badam use_dft_loss use_eaft_loss use_galore use_hyper_parallel use_kt
    use_llama_pro use_mca use_muon
"""
REFUSED |= {key: ((False, 0, -1), LATER) for key in _SWITCHES.split()}
