"""vLLM reads compressed folders: a plugin, on little else than torch and vLLM itself."""
