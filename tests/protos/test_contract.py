"""The wire contract: what was once released keeps its numbers and types."""

from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from loraplex_protos.v1 import adapters_pb2, generation_pb2, status_pb2

GOLDEN = Path(__file__).parent / "golden.binpb"


def fields(files: FileDescriptorSet) -> dict[str, tuple[int, int, str, int]]:
    """Full name -> (number, type, type name, label) of every field, and -> number of every enum value."""
    found: dict[str, tuple[int, int, str, int]] = {}
    for file in files.file:
        if not file.package.startswith("loraplex"):
            continue
        for message in file.message_type:
            for field in message.field:
                name = f"{file.package}.{message.name}.{field.name}"
                found[name] = (field.number, field.type, field.type_name, field.label)
        for enum in file.enum_type:
            for value in enum.value:
                found[f"{file.package}.{enum.name}.{value.name}"] = (value.number, 0, "", 0)
        for service in file.service:
            for method in service.method:
                types = f"{method.input_type} {method.output_type} {method.server_streaming}"
                found[f"{file.package}.{service.name}.{method.name}"] = (0, 0, types, 0)
    return found


def test_nothing_of_the_golden_contract_changed_or_vanished() -> None:
    golden = fields(FileDescriptorSet.FromString(GOLDEN.read_bytes()))
    now = FileDescriptorSet()
    for module in (generation_pb2, adapters_pb2, status_pb2):
        module.DESCRIPTOR.CopyToProto(now.file.add())
    current = fields(now)
    assert len(golden) > 60
    broken = {name: (was, current.get(name)) for name, was in golden.items() if current.get(name) != was}
    assert broken == {}, "add fields, never change or remove them; see CONTRIBUTING.md"
