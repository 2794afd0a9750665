"""One YAML a model: shape, hub id, template, advised layouts. Read by lens_megatron.model_spec."""
