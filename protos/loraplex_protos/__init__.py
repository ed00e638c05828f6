"""loraplex's wire contract: the .proto files and the code generated from them (`make protos`)."""
