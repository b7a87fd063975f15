"""How trained weights leave: pipeline folders, adapters and single files, verified, with a model card."""
