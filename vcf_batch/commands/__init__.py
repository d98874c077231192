"""The work of plan, preview, verify, repair, push and model evaluate. Other commands call their package directly."""
