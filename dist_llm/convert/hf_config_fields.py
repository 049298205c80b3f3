"""The fields of a Hugging Face config.json. A field that is neither read nor known to be harmless is an error."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dist_llm.errors import CheckpointError

# Fields without effect on the forward pass of a trained model: metadata, generation, training, unused heads.
HARMLESS_FIELDS = {
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures"),
    *("attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward"),
    *("custom_pipelines", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id"),
    *("forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "is_encoder_decoder"),
    *("label2id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups"),
    *("num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states"),
    *("output_past", "output_scores", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty"),
    *("return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params"),
    *("temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript"),
    *("transformers_version", "typical_p", "use_bfloat16", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("cls_token_id", "mask_token_id", "unk_token_id", "vocab_size", "model_type", "cross_attention_hidden_size"),
    *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "hidden_dropout_prob"),
    *("hidden_dropout", "residual_dropout", "embedding_dropout", "layerdrop"),
    *("resid_pdrop", "dropout", "dropout_rate", "activation_dropout", "classifier_dropout", "classif_dropout"),
    *("encoder_layerdrop", "decoder_layerdrop", "initializer_factor", "init_std", "summary_type", "summary_use_proj"),
    *("summary_activation", "summary_proj_to_labels", "summary_first_dropout", "n_ctx", "reorder_and_upcast_attn"),
    *("pretraining_tp", "max_window_layers", "classifier_activation", "extra_pos_embeddings"),
    *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
    *("pooler_type", "force_bos_token_to_be_generated", "gradient_checkpointing_kwargs", "unsloth_version"),
    # Training of routers, and the layers that predict further tokens.
    *("router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "num_nextn_predict_layers"),
    # Only the first segment of BERT is used. BART has its number of layers in encoder_layers and decoder_layers.
    *("type_vocab_size", "num_hidden_layers"),
    # Whether a head shares the embedding is decided by the tensors; unequal tensors are an error.
    "tie_word_embeddings",
}
# Values that disable the feature of a field. Any other value of these fields is an error.
OFF_VALUES: dict[str, Any] = {
    "pruned_heads": {},
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
    "use_bidirectional_attention": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "normalize_before": False,
    "normalize_embedding": True,
    "static_position_embeddings": False,
    "scale_embedding": False,
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
}


class ConfigFields(Mapping[str, Any]):
    """The fields of a config.json. Records which fields were read."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.names_read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names_read.add(name)
        return self.fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.fields)

    def __len__(self) -> int:
        return len(self.fields)

    def require(self, **supported_values: Any) -> None:
        """Raise CheckpointError if a field is present and its value differs from the supported one."""
        for name, value in supported_values.items():
            if self.get(name, value) != value:
                raise CheckpointError(f"config.json: {name} {self[name]} is not supported, only {value}")

    def check_all_read(self, ignored: Collection[str] = ()) -> None:
        """Raise CheckpointError for a field that was not read and may change the outputs of the model."""
        for name, value in self.fields.items():
            if name in self.names_read or name in HARMLESS_FIELDS or name in ignored or value is None:
                continue
            if name not in OFF_VALUES:
                raise CheckpointError(
                    f"config.json: the field {name} ({value!r}) is unknown for model_type "
                    f"{self.fields.get('model_type')}, and may change what the model computes; if you know that it "
                    f"does not, convert with --ignore-field {name}"
                )
            if value != OFF_VALUES[name]:
                raise CheckpointError(f"config.json: {name} {value} is not supported, only {OFF_VALUES[name]}")
