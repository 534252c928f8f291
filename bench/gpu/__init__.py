"""What a GPU is asked, in the order in which the answers decide what comes next: `python -m bench gpu`.

order       the questions, by item
walk        each asked of a process with a deadline; a line of the journal for each answer
answers     that process
summary     the answers as tables
"""
