"""The marking of images as synthetic, for machines: XMP (ISO 16684-1) inside each image file.

Prompt and reference are not in it: a picture may travel without its data set, and what was asked for may be nobody's
business. The key leads back to them.
"""

import json
from xml.sax.saxutils import quoteattr

from vcf_batch.records import Sample

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for what a trained model made; search engines and the EU's AI Act ask for such a mark."""

NAMESPACE = "urn:vcf-batch:generation#"
"""Of the properties that tell how an image was made."""

_PRIVATE = ("negative_prompt",)

_PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" \
xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:vcf="{namespace}" Iptc4xmpExt:DigitalSourceType="{source}" \
xmp:CreatorTool="vcf-batch"{properties}/></rdf:RDF></x:xmpmeta>\
<?xpacket end="r"?>"""


def xmp(sample: Sample, model: str) -> bytes:
    """The XMP packet of a sample's image: its key, the model's identity, and its settings but for those that are null.

    The same arguments always give the same bytes.
    """
    told = {"key": sample.row.key, "model": model, **sample.settings}
    properties = "".join(
        f" vcf:{name}={quoteattr(value if isinstance(value, str) else json.dumps(value))}"
        for name, value in told.items()
        if value is not None and name not in _PRIVATE
    )
    return _PACKET.format(namespace=NAMESPACE, source=SOURCE_TYPE, properties=properties).encode()
