"""What V-JEPA learns under which settings: experiments that take minutes to hours, as scripts."""
