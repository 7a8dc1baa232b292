"""The finished artifact: its configuration, manifest, verification, licence, card and upload."""
