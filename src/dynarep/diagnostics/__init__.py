"""What is measured about an agent. Nothing here changes one: no gradient stays behind, no draw is shared."""
