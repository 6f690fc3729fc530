"""House rules of the protos that the compiler does not keep."""

from collections.abc import Iterator
from pathlib import Path

import grpc_tools.protoc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from unmask.v1 import generation_pb2

PROTOS = Path(__file__).parents[2] / "protos"
FILE = generation_pb2.DESCRIPTOR
METHODS = [method for service in FILE.services_by_name.values() for method in service.methods]


def fields() -> Iterator[FieldDescriptor]:
    for message in FILE.message_types_by_name.values():
        yield from message.fields


def test_an_unset_scalar_differs_from_zero() -> None:
    for field in fields():
        assert field.has_presence or field.is_repeated, field.full_name


def test_the_zero_of_every_enum_says_unspecified() -> None:
    for enum in FILE.enum_types_by_name.values():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED"), enum.full_name


def test_every_call_has_messages_of_its_own() -> None:
    messages: list[Descriptor] = []
    for method in METHODS:
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"
        messages += [method.input_type, method.output_type]
    assert len({message.full_name for message in messages}) == len(messages)


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> FileDescriptorSet:
    """The protos with their comments."""
    output = tmp_path_factory.mktemp("protos") / "set"
    names = [str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto")]
    arguments = ["protoc", f"-I{PROTOS}", "--include_source_info", f"--descriptor_set_out={output}", *names]
    assert grpc_tools.protoc.main(arguments) == 0
    return FileDescriptorSet.FromString(output.read_bytes())


def test_everything_on_the_wire_is_explained(described: FileDescriptorSet) -> None:
    """Path elements: 4 message, 5 enum, 6 service; then 2 field, value or method."""
    for file in described.file:
        explained = {tuple(place.path) for place in file.source_code_info.location if place.leading_comments}
        for kind, things in ((4, file.message_type), (5, file.enum_type), (6, file.service)):
            for number, thing in enumerate(things):
                assert (kind, number) in explained, thing.name
                parts = {4: "field", 5: "value", 6: "method"}[kind]
                for place, part in enumerate(getattr(thing, parts)):
                    assert (kind, number, 2, place) in explained, f"{thing.name}.{part.name}"
