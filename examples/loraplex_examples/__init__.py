"""What can be run without anything prepared: the demo, its tiny base model and its tenants' tasks.

The only package that may import all the others; nothing imports it.
"""
