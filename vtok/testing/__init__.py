"""For those who write methods: suites of tests that every method passes, on tiny models of every supported family.

    from vtok.testing import EncoderMethodTests, PromptMethodTests

    class TestMine(EncoderMethodTests):  # pytest collects it
        config = Mine(keep=0.8)

The checks themselves are functions (`vtok.testing.encoder_checks`, `vtok.testing.prompt_checks`) that need no pytest.
"""

from vtok.testing.suites import EncoderMethodTests, PromptMethodTests

__all__ = ["EncoderMethodTests", "PromptMethodTests"]
