"""The loraplex trainer: from instruction data to a signed adapter.

`loraplex train config.yaml` runs it. Read in this order: `config`, `data`, `methods`, `recipe`, `publish`.
"""
