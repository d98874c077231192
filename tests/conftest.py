"""What holds for every test module."""

from hypothesis import settings

# No test is timed: machines that run the suite do other things besides.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
