"""Device types: their names, and what tells two of them apart."""

from collections import Counter

from vcf_batch.driver.device_types import MAX_SHOWN, DeviceTypes, differences
from vcf_batch.output.receipts import device_type


def test_a_device_types_name_tells_all_that_its_device_says() -> None:
    """Two devices that differ in anything have different names, though GPU models are equal."""
    device = {"type": "NVIDIA H200", "attention": "cudnn", "versions": {"cudnn": 91501}}
    other = device | {"versions": {"cudnn": 91600}}
    names = {device_type(device), device_type(other), device_type(device | {"type": "NVIDIA H100"})}
    assert len(names) == 3
    assert device_type(dict(reversed(device.items()))) == device_type(device)
    assert device_type(device).startswith("NVIDIA H200 #")
    assert (device_type({"type": "gpu"}), device_type({}), device_type({"several": [device, other]})) == (
        "gpu",
        "unknown",
        "several",
    )


def test_differences_are_named_with_both_values() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}}) == "a.b 1 / 3"
    many = {str(number): number for number in range(MAX_SHOWN + 3)}
    assert differences(many, {}).endswith("4 4 / none, and 3 more")


def test_the_type_of_most_rows_is_kept_to() -> None:
    """Of receipts of several types no one type is known; of shards that are done again the type is."""
    devices = {"a": {"type": "a"}, "b": {"type": "b"}}
    assert DeviceTypes(devices, Counter({"several": 9, "a": 1, "b": 2}), one=True).chosen == "b"
    assert DeviceTypes(devices, Counter(), one=True).chosen == "a"
    assert DeviceTypes({}, Counter({"unknown": 3}), one=True).chosen is None
    assert DeviceTypes(devices, Counter({"b": 2}), one=False).takes("c")
