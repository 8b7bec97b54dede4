"""A trained adapter at work: loading, generating, scoring, comparing."""
