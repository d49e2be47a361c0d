"""Model families: text models and vision towers that go together."""
