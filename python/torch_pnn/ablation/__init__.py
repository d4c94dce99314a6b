"""Ablation studies: arms trained side by side with the same seeds, and a report on what came out.

One concern a file:

    study        what a study is: settings, fingerprint
    files        studies as YAML files; the ready-made ones lie in studies/
    keys         what each key of such a file takes
    nodes        YAML as a tree that knows its lines
    plan         what a study will do and cost, before it does it

    arms         which networks are compared
    networks     what the arms' layers stand in
    layers       what stands in a convolution's place
    data         the images and their split
    tasks        what outputs mean: losses and scores
    detection    average precision, boxes

    training     one run: an arm with a seed
    checkpoint   what a run goes on from
    distributed  one run over several processes
    worker       a process that does one run after another
    runner       all runs of a study, side by side
    records      the study's folder: rows, resuming, what is refused
    claims       which process does which run
    index        the rows for queries
    progress     the bar with the remaining time
    loggers      hooks for TensorBoard and the like
    memory       what a run needed of it

    statistics   paired differences, intervals, the verdict
    answers      the further questions, in plain words
    tables       the figures arm by arm
    showcase     what a mask does to one image
    plots        the report's drawings
    page         the report's frame
    report       the report
    compare      several studies on one page

    environment  versions, instruction set, compiled operators or not
    errors       what a person is told when something can't be done

Nothing here is imported by ``import torch_pnn``; the command line imports it when it needs it.
"""
