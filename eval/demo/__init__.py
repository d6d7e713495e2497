"""The main job: methods for encoders, todre, atp and correlation on the reference models, beside random and uniform."""
