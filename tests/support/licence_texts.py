"""Texts for licence tests: the sentences the policies look for, not the licences themselves."""

from __future__ import annotations

import json

from l4pack.resources import data_text

LICENSE = """LLAMA 4 COMMUNITY LICENSE AGREEMENT
Llama 4 Version Effective Date: April 5, 2025
b. Redistribution and Use.
i. If you distribute or make available the Llama Materials (or any derivative works thereof), or a product or service
(including another AI model) that contains any of them, you shall (A) provide a copy of this Agreement with any such
Llama Materials; and (B) prominently display “Built with Llama” on a related website, user interface, blogpost, about
page, or product documentation. If you use the Llama Materials or any outputs or results of the Llama Materials to
create, train, fine tune, or otherwise improve an AI model, which is distributed or made available, you shall also
include “Llama” at the beginning of any such AI model name.
iii. You must retain in all copies of the Llama Materials that you distribute the following attribution notice within a
“Notice” text file distributed as a part of such copies: “Llama 4 is licensed under the Llama 4 Community License,
Copyright © Meta Platforms, Inc. All Rights Reserved.”
2. Additional Commercial Terms. If, on the Llama 4 version release date, the monthly active users of the products or
services made available by or for Licensee, or Licensee’s affiliates, is greater than 700 million monthly active users
in the preceding calendar month, you must request a license from Meta.
"""
USE_POLICY = """# Llama 4 Acceptable Use Policy
With respect to any multimodal models included in Llama 4, the rights granted under Section 1(a) of the Llama 4
Community License Agreement are not being granted to you if you are an individual domiciled in, or a company with a
principal place of business in, the European Union. This restriction does not apply to end users of a product or
service that incorporates any such multimodal models.
"""
NOTICE = (
    "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
)
CARD = """---
license: other
license_name: llama4
license_link: https://www.llama.com/llama4/license/
base_model:
- meta-llama/Llama-4-Scout-17B-16E-Instruct
base_model_relation: quantized
---

# Llama-4-Scout-17B-16E-Instruct-W4A16-g128

**Built with Llama**

Some words.

## Licence

The multimodal models of Llama 4 are not licensed to individuals domiciled in, or companies with a
principal place of business in, the European Union.

Whoever had more than 700 million monthly active users must ask Meta (Section 2).
"""
APACHE = """                                 Apache License
                           Version 2.0, January 2004

   TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION
"""


def scout_files() -> dict[str, bytes]:
    """A quantized Scout that meets every duty (without weights: an audit does not read them)."""
    texts = {
        "LICENSE": LICENSE,
        "USE_POLICY.md": USE_POLICY,
        "NOTICE": NOTICE,
        "README.md": CARD,
        "config.json": data_text("model", "configs", "llama-4-scout.json"),
    }
    return {name: text.encode() for name, text in texts.items()}


def other_files() -> dict[str, bytes]:
    """A model of the same architecture that is not Llama 4: its own dimensions, its own licence."""
    config = {"model_type": "llama4", "text_config": {"hidden_size": 64, "vocab_size": 512}}
    card = "---\nlicense: apache-2.0\nbase_model: somebody/tiny\n---\n# tiny\n\nWeights quantized to int4.\n"
    return {"config.json": json.dumps(config).encode(), "README.md": card.encode(), "LICENSE": APACHE.encode()}
