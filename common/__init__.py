"""What both sides must agree on; imports none of the other rooms.

Every process of Coadapt imports this room before any library that would report to its makers, so this is where that is
switched off: Flower's, Ray's and Hugging Face's reports and questions for updates, and onnxruntime's, which since 1.29
uploads events from Linux too and keeps a device number in the home folder.
"""

import logging
import os

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}

# PEFT imports bitsandbytes, which says on every start that a faster kernel could be installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
