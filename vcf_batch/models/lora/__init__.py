"""Files of LoRAs, as far as their headers tell. Nothing is loaded, so torch is not needed."""
