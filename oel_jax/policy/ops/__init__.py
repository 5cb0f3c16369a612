"""Operations that have a kernel of their own beside their plain form."""
