"""The marking of images as synthetic, for machines: XMP (ISO 16684-1) inside each image file.

The mark contains neither prompt nor reference nor the name of a LoRA, because they may be private and an image may be
shared without its data set. The key leads to both in the data set.
"""

import json
from xml.sax.saxutils import quoteattr

from vcf_batch.records import Sample

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for an image made by a trained model. Search engines and the EU's AI Act ask for such a mark."""

NAMESPACE = "urn:vcf-batch:generation#"
"""Namespace of the properties that describe how an image was made."""

_PRIVATE = ("negative_prompt", "lora")

_PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" \
xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:vcf="{namespace}" Iptc4xmpExt:DigitalSourceType="{source}" \
xmp:CreatorTool="vcf-batch"{properties}/></rdf:RDF></x:xmpmeta>\
<?xpacket end="r"?>"""


def xmp(sample: Sample, model: str) -> bytes:
    """The XMP packet of a sample's image: its key, the model's identity, the hashes of its LoRAs, and all settings that
    are not null.

    The same arguments always give the same bytes.
    """
    told = {"key": sample.row.key, "model": model, **sample.settings, "lora_sha256": sample.lora_sha256}
    properties = "".join(
        f" vcf:{name}={quoteattr(value if isinstance(value, str) else json.dumps(value))}"
        for name, value in told.items()
        if value is not None and name not in _PRIVATE
    )
    return _PACKET.format(namespace=NAMESPACE, source=SOURCE_TYPE, properties=properties).encode()
