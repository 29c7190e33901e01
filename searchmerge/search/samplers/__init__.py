"""The samplers, one kind a module; a registry imports them when one is looked up."""
