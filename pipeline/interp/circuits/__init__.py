"""Attribution graphs: what made a prompt's next token, and what is made of such graphs."""
